"""Attention over whole sequences: every implementation against the plain loop, forward and gradient."""

import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import compiled
from moe_jax.kernels.causal_attention import reference
from moe_jax.kernels.causal_attention.api import IMPLEMENTATIONS, causal_attention

# largest difference over the largest value of the reference
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
# rows, positions, heads of queries, heads of keys, channels of keys, channels of values, segments, largest score
CASES = {
    "one_segment": (2, 40, 4, 2, 16, 16, "one", 4),
    "one_position": (3, 1, 4, 2, 16, 16, "one", 4),
    "whole_blocks": (1, 128, 2, 1, 64, 64, "one", 4),
    "not_a_multiple_of_the_block": (1, 201, 2, 2, 24, 24, "one", 4),
    "several_segments": (2, 150, 2, 1, 16, 16, "several", 4),
    "prefix_segments": (3, 150, 2, 1, 16, 16, "prefix", 4),
    "padding": (3, 140, 2, 2, 16, 16, "padding", 4),
    "segments_in_any_order": (2, 150, 2, 1, 16, 16, "drawn", 4),
    "more_heads_than_a_piece": (1, 70, 7, 1, 16, 16, "one", 4),
    "narrow_values": (1, 70, 3, 3, 192, 128, "one", 4),
    "wide_values": (1, 70, 2, 1, 6, 50, "several", 4),
    "one_more_than_a_block": (1, 129, 2, 1, 16, 16, "one", 4),
    "one_more_than_a_long_block": (1, 257, 4, 2, 16, 16, "several", 4),
    "one_less_than_several_blocks": (3, 383, 6, 3, 8, 8, "prefix", 4),
    "several_blocks": (1, 512, 2, 1, 16, 16, "one", 4),
    "large_scores": (2, 100, 4, 2, 16, 16, "several", 1000),
}
ROUNDED = 2**-22  # of a score, which is float32: shares are off by as much


def segments(kind, rows, length):
    rng = np.random.default_rng(1)
    if kind == "drawn":
        return rng.integers(-1, 4, (rows, length)).astype(np.int32)
    segments_BT = np.ones((rows, length), np.int32)
    for row in range(rows):
        if kind in ("several", "prefix"):  # of lengths that have blocks of one and of many
            cuts = np.sort(rng.choice(np.arange(1, length), min(length - 1, 3), replace=False))
            segments_BT[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
        if kind == "prefix":
            segments_BT[row, : (70, 20, 128)[row]] = -1
            segments_BT[row, 10:20] = (-1, -2, -7)[row]
        if kind == "padding":
            segments_BT[row, (100, 30, 64)[row] :] = 0
    return segments_BT


def draw(case, dtype):
    rows, length, heads, kv_heads, key_channels, value_channels, kind, score = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, key = normal(rows, length, heads, key_channels), normal(rows, length, kv_heads, key_channels)
    value, grad = normal(rows, length, kv_heads, value_channels), normal(rows, length, heads, value_channels)
    products = np.einsum("bthga,bmga->bhtm", *split_heads(query, key))
    return query, key, value, segments(kind, rows, length), float(score / np.abs(products).max()), grad


def split_heads(query, key):
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    return query[:, :, :, None], np.repeat(key, query.shape[2] // key.shape[2], axis=2)[:, :, :1]


def run(implementation, query, key, value, segments_BT, scale, grad):
    """What is mixed, and the gradients."""

    @jax.jit
    def call(query, key, value, segments_BT, grad):
        def mix(*inputs):
            return causal_attention(*inputs, segments_BT, scale, implementation)

        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    return call(query, key, value, segments_BT, grad)


def plain(query, key, value, segments_BT, scale, grad):
    inputs = (query, key, value, segments_BT, scale)
    return reference.forward(*inputs), *reference.backward(*inputs, grad)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mixes_and_has_the_gradients_of_the_plain_loop(implementation, case, dtype):
    given = draw(case, dtype)
    for name, got, wanted in zip(("mixed", "query", "key", "value"), run(implementation, *given), plain(*given)):
        assert got.dtype == jnp.dtype(dtype) and got.shape == wanted.shape
        allowed = TOLERANCE[dtype] + ROUNDED * CASES[case][-1]
        largest = max(np.abs(wanted).max(), given[4] * np.abs(given[1]).max())  # 0 for a query that sees one key
        assert np.abs(np.asarray(got, np.float64) - wanted).max() <= allowed * largest, name


def test_the_plain_loop_has_the_gradients_of_a_dense_softmax():
    query, key, value, segments_BT, scale, grad = draw("prefix_segments", "float32")

    @jax.jit
    def dense(query, key, value):
        own = segments_BT[:, :, None] == segments_BT[:, None, :]
        seen_BTM = jnp.tril(own | (segments_BT < 0)[:, None, :])
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        score_BHTM = scale * jnp.einsum("btha,bmha->bhtm", query, key)
        share_BHTM = jax.nn.softmax(jnp.where(seen_BTM[:, None], score_BHTM, -jnp.inf), axis=-1)
        return jnp.einsum("bhtm,bmhx->bthx", share_BHTM, value)

    mixed, pull = jax.vjp(dense, query, key, value)
    for got, wanted in zip((mixed, *pull(grad)), plain(query, key, value, segments_BT, scale, grad)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_a_position_does_not_see_changes_nothing_bit_for_bit(implementation):
    """Other segments and later positions, from which no gradient comes back either."""
    query, key, value, segments_BT, scale, grad = draw("several_segments", "float32")
    at = 90
    seen_BT = (segments_BT == segments_BT[:, at : at + 1]) & (np.arange(segments_BT.shape[1]) <= at)[None]
    assert seen_BT.sum(axis=1).min() > 1 and seen_BT.sum(axis=1).max() < at
    key_2, value_2 = (jnp.where(seen_BT[:, :, None, None], x, 100 * x + 1) for x in (key, value))
    only_at = grad * (np.arange(grad.shape[1]) == at)[None, :, None, None]
    once = run(implementation, query, key, value, segments_BT, scale, only_at)
    again = run(implementation, query, key_2, value_2, segments_BT, scale, only_at)
    np.testing.assert_array_equal(once[0][:, at], again[0][:, at])
    for one, other in zip(once[1:], again[1:]):
        np.testing.assert_array_equal(one, other)
    for of_keys in again[2:]:
        assert not np.asarray(of_keys)[~seen_BT].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_later_positions_are_not_multiplied(implementation):
    """What is no number there would leave its mark, even times a share of zero."""
    query, key, value, segments_BT, scale, grad = draw("several_blocks", "float32")
    value = value.at[:, 384:].set(np.nan)
    mixed, query_grad, _, _ = run(implementation, query, key, value, segments_BT, scale, grad.at[:, 384:].set(0))
    for got in (mixed, query_grad):
        assert np.isnan(got[:, 384:]).all() and np.isfinite(got[:, :256]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_score_that_is_no_number_is_not_hidden(implementation):
    """Training that diverges has to be seen."""
    query, key, value, segments_BT, scale, grad = draw("not_a_multiple_of_the_block", "float32")
    for bad in (np.nan, np.inf):
        mixed, *grads = run(implementation, query.at[0, 150, 1, 0].set(bad), key, value, segments_BT, scale, grad)
        is_nan = np.isnan(mixed)
        assert is_nan[0, 150, 1].all() and is_nan.sum() == is_nan[0, 150, 1].size
        assert all(np.isnan(of_input).any() for of_input in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_of_several_dtypes(implementation):
    query, key, value, segments_BT, scale, grad = draw("one_segment", "float32")
    value, grad = value.astype("bfloat16"), grad.astype("bfloat16")
    mixed, *grads = run(implementation, query, key, value, segments_BT, scale, grad)
    assert [x.dtype.name for x in (mixed, *grads)] == ["bfloat16", "float32", "float32", "bfloat16"]
    wanted = reference.forward(query, key, value, segments_BT, scale)
    np.testing.assert_allclose(np.asarray(mixed, np.float64), wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


def test_numbers_that_are_no_floats_are_refused():
    ones = jnp.ones((1, 4, 2, 8), jnp.int32)
    with pytest.raises(ValueError, match="values are int32: wanted one of three floats"):
        causal_attention(ones, ones, ones, ones[:, :, 0, 0], 1.0, "native")


def lowered(implementation, length):
    """The forward pass and the gradient, of so many positions."""
    x, ones_BT = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32), jnp.ones((1, length), jnp.int32)

    def mix(*inputs):
        return causal_attention(*inputs, ones_BT, 1.0, implementation)

    def with_gradient(query, key, value, grad):
        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    return jax.jit(with_gradient).lower(x, x, x, x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_scores_are_kept(implementation):
    """What is allocated grows with the length, not with its square."""

    def size(length):
        return lowered(implementation, length).compile().memory_analysis().temp_size_in_bytes

    assert size(4096) < 2.2 * size(2048)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_longer_sequence_is_no_longer_program(implementation):
    lines = [len(lowered(implementation, length).as_text().splitlines()) for length in (2048, 32768)]
    assert lines[1] <= 1.05 * lines[0]


def digest():
    """Of results and gradients of many pieces of work, and the threads that there may be."""
    given = draw("prefix_segments", "float32")
    rows = [jnp.concatenate([x] * 4) for x in given[:4]]
    results = run("native", *rows, given[4], jnp.concatenate([given[5]] * 4))
    bits = b"".join(np.asarray(x).tobytes() for x in results)
    return f"{hashlib.sha256(bits).hexdigest()} {len(os.sched_getaffinity(0))}"


def test_results_are_the_same_bit_for_bit_whatever_the_number_of_threads():
    assert compiled.compiler()
    one = sorted(os.sched_getaffinity(0))[:1]
    program = f"import os; os.sched_setaffinity(0, {one}); from tests.kernels import test_causal_attention as test"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"{program}; print(test.digest())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    on_one_thread, threads = done.stdout.split()
    assert threads == "1" and {digest().split()[0] for _ in range(5)} == {on_one_thread}
