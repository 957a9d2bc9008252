"""A prompt read in chunks gives the same logits as when read at once, with every kind of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.engine import cache as caches
from moe_jax.kernels.chooser import Kernels
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from tests import tiny_model

TOLERANCE = 1e-5  # of the largest value, float32
KINDS = {
    "grouped": tiny_model.ARCHITECTURE,
    "latent": tiny_model.changed(
        attention={
            **{"kind": "latent", "qk_norm": False, "latent_rank": 24},
            **{"nope_head_dim": 16, "rope_head_dim": 8, "value_head_dim": 12},
        }
    ),
}
# tokens of each row in the first chunk, before padding, which the next chunk overwrites
FIRST_B = np.array([5, 3, 8, 1], np.int32)


@functools.partial(jax.jit, static_argnames="execution")
def extend(params, cache, tokens_BT, start_B, valid_BT, live, *, execution):
    x_BTD, cache, _ = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, live, execution)
    return decoder.logits(params, x_BTD), cache


@functools.partial(jax.jit, static_argnames="execution")
def whole(params, tokens_BT, live, *, execution):
    positions_BT = jnp.tile(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), (len(tokens_BT), 1))
    x_BTD, _ = decoder.hidden(params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), live, execution)
    return decoder.logits(params, x_BTD)


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("kernels", [tiny_model.KERNELS, Kernels("blocked", "xla", "xla", "blocked")])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_from_any_start_equal_the_whole_sequence(kind, kernels):
    """The second chunk begins at another position in every row; a decode step and a last chunk fill the cache."""
    architecture = KINDS[kind]
    params = tiny_model.random_params(architecture)
    live = policies.settings([parse(f"topk:{k}") for k in (8, 2, 5, 1)], architecture, 8)
    execution = decoder.Execution(architecture, 8, kernels)
    tokens_BT = np.random.default_rng(0).integers(0, 512, (4, 25), dtype=np.int32)
    expected_BTV = whole(params, tokens_BT, live, execution=execution)
    cache, rows = caches.allocate(architecture, 4, 25, jnp.float32), np.arange(4)[:, None]

    def read(start_B, length, valid_B):
        nonlocal cache
        place_BT = (np.zeros(4, np.int32) if start_B is None else start_B)[:, None] + np.arange(length)
        valid_BT = np.arange(length)[None, :] < valid_B[:, None]
        logits_BTV, cache = extend(
            params, cache, tokens_BT[rows, place_BT], start_B, valid_BT, live, execution=execution
        )
        for row, valid_T in enumerate(valid_BT):
            assert_close(logits_BTV[row, valid_T], expected_BTV[row, place_BT[row, valid_T]])

    for start_B in (None, np.zeros(4, np.int32)):
        read(start_B, 8, FIRST_B)
        read(FIRST_B, 8, np.full(4, 8))
        read(FIRST_B + 8, 1, np.ones(4))
        read(FIRST_B + 9, 8, np.full(4, 8))
