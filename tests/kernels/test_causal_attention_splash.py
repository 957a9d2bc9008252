"""Splash attention against the plain loop, interpreted on a CPU; and what it refuses."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.causal_attention import splash
from moe_jax.kernels.causal_attention.api import IMPLEMENTATIONS, causal_attention
from tests.kernels import test_causal_attention as shared


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    mix = functools.partial(splash.mix, interpret=True)
    monkeypatch.setitem(IMPLEMENTATIONS, "splash", types.SimpleNamespace(mix=mix, PREFIXES=splash.PREFIXES))


@pytest.mark.parametrize(
    ("case", "dtype", "segmented"),
    [
        ("one_segment", "float32", False),
        ("several_segments", "bfloat16", True),
        ("narrow_values", "float32", True),
        ("from_within_a_long_block", "float32", True),
    ],
)
def test_values_and_gradients_equal_the_plain_loop(case, dtype, segmented):
    given = shared.random_inputs(case, dtype)
    segments_BM = given[3] if segmented else None
    shared.check(shared.run("splash", *given[:3], segments_BM, *given[4:]), given, case, dtype)


def test_every_row_may_start_elsewhere_and_sees_nothing_later():
    given = list(shared.random_inputs("from_a_block_on", "float32"))
    key, value, length = *given[1:3], given[0].shape[1]
    given[4] = np.array([0, key.shape[1] - length], np.int32)
    once = shared.run("splash", *given[:3], None, *given[4:])
    shared.check(once, given, "from_a_block_on", "float32")
    unseen_BM = np.arange(key.shape[1])[None, :] >= given[4][:, None] + length
    given[1:3] = (jnp.where(unseen_BM[:, :, None, None], 100 * x + 1, x) for x in (key, value))
    again = shared.run("splash", *given[:3], None, *given[4:])
    for one, other in zip(once, again):
        np.testing.assert_array_equal(one, other)
    for key_grad in again[2:]:
        assert unseen_BM.any() and not np.asarray(key_grad)[unseen_BM].any()


def test_unseen_positions_change_nothing_bit_for_bit():
    shared.test_unseen_positions_change_nothing_bit_for_bit("splash")


def test_blocks_of_later_positions_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)
    shared.test_blocks_of_later_positions_are_not_multiplied("splash")


def test_a_call_with_prefixes_is_left_to_blocked():
    assert not splash.PREFIXES
    given = shared.random_inputs("prefix_segments", "bfloat16")
    for one, other in zip(shared.run("splash", *given), shared.run("blocked", *given)):
        np.testing.assert_array_equal(one, other)


def test_half_precision_with_a_narrow_exponent_is_refused():
    halves = jnp.ones((1, 4, 2, 8), jnp.float16)
    with pytest.raises(ValueError, match="splash multiplies bfloat16 and float32, not float16; blocked would run"):
        causal_attention(halves, halves, halves, None, jnp.zeros(1, jnp.int32), 1.0, "splash", prefixes=False)


@pytest.mark.parametrize(
    ("size", "block"), [(1, 128), (128, 128), (129, 256), (512, 512), (700, 384), (2048, 512), (2049, 512)]
)
def test_blocks_are_even_and_in_whole_lanes(size, block):
    assert splash._block(size) == block <= splash.BLOCK
    assert -size % block < -(-size // splash.BLOCK) * splash.LANES
