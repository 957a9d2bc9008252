"""Causal attention: every implementation against the plain loop, forward and gradient."""

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
from moe_jax.kernels.causal_attention.api import BY_PLATFORM, causal_attention

HERE = BY_PLATFORM["cpu"]  # others have files of their own
# largest difference over the largest value of the reference
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
# rows, positions of keys, query heads, key heads, channels of keys, channels of values, segments, largest score
CASES = {
    "one_segment": (2, 40, 4, 2, 16, 16, "one", 4),
    "one_position": (3, 1, 4, 2, 16, 16, "one", 4),
    "whole_blocks": (1, 128, 2, 1, 64, 64, "one", 4),
    "not_a_multiple_of_the_block": (1, 201, 2, 2, 24, 24, "one", 4),
    "several_segments": (2, 150, 2, 1, 16, 16, "several", 4),
    "prefix_segments": (3, 150, 2, 1, 16, 16, "prefix", 4),
    "padding": (3, 140, 2, 2, 16, 16, "padding", 4),
    "segments_in_any_order": (2, 150, 2, 1, 16, 16, "random", 4),
    "more_heads_than_a_piece": (1, 70, 7, 1, 16, 16, "one", 4),
    "narrow_values": (1, 70, 3, 3, 192, 128, "one", 4),
    "wide_values": (1, 70, 2, 1, 6, 50, "several", 4),
    "one_more_than_a_block": (1, 129, 2, 1, 16, 16, "one", 4),
    "one_more_than_a_long_block": (1, 257, 4, 2, 16, 16, "several", 4),
    "one_less_than_several_blocks": (3, 383, 6, 3, 8, 8, "prefix", 4),
    "several_blocks": (1, 512, 2, 1, 16, 16, "one", 4),
    "large_scores": (2, 100, 4, 2, 16, 16, "several", 1000),
    "from_a_block_on": (2, 200, 4, 2, 16, 16, "one", 4),
    "every_row_from_elsewhere": (3, 300, 6, 3, 16, 24, "prefix", 4),
    "from_within_a_long_block": (1, 700, 2, 1, 16, 16, "several", 4),
    "one_query_of_many_keys": (2, 150, 2, 1, 16, 16, "random", 4),
}
# positions of queries and the first one of each row, if queries are fewer than keys; "every_row_from_elsewhere" has its
# first row in one block of 64 more than it would fill
QUERIES = {
    "from_a_block_on": (70, (64, 64)),
    "every_row_from_elsewhere": (130, (63, 170, 0)),
    "from_within_a_long_block": (300, (391,)),
    "one_query_of_many_keys": (1, (5, 149)),
}
# only in float32: these cases differ in length
LENGTHS = {name for name in CASES if name.startswith(("one_more", "one_less", "several_blocks", "from"))}
ROUNDED = 2**-22  # rounding of a float32 score; shares have the same relative error


def segments(kind, rows, length):
    rng = np.random.default_rng(1)
    if kind == "random":
        return rng.integers(-1, 4, (rows, length)).astype(np.int32)
    segments_BM = np.ones((rows, length), np.int32)
    for row in range(rows):
        if kind in ("several", "prefix"):  # lengths with one block and with many
            cuts = np.sort(rng.choice(np.arange(1, length), min(length - 1, 3), replace=False))
            segments_BM[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
        if kind == "prefix":
            segments_BM[row, : (70, 20, 128)[row]] = -1
            segments_BM[row, 10:20] = (-1, -2, -7)[row]
        if kind == "padding":
            segments_BM[row, (100, 30, 64)[row] :] = 0
    return segments_BM


def random_inputs(case, dtype):
    rows, length, heads, kv_heads, key_channels, value_channels, kind, score = CASES[case]
    queries, start = QUERIES.get(case, (length, (0,) * rows))
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, key = normal(rows, queries, heads, key_channels), normal(rows, length, kv_heads, key_channels)
    value, grad = normal(rows, length, kv_heads, value_channels), normal(rows, queries, heads, value_channels)
    products = np.einsum("bthga,bmga->bhtm", *split_heads(query, key))
    places = segments(kind, rows, length), np.array(start, np.int32)
    return query, key, value, *places, float(score / np.abs(products).max()), grad


def split_heads(query, key):
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    return query[:, :, :, None], np.repeat(key, query.shape[2] // key.shape[2], axis=2)[:, :, :1]


def run(implementation, query, key, value, segments_BM, start_B, scale, grad):
    """The mixed values, and the gradients."""
    prefixes = segments_BM is not None and bool((segments_BM < 0).any())

    @jax.jit
    def call(query, key, value, segments_BM, start_B, grad):
        def mix(*inputs):
            return causal_attention(*inputs, segments_BM, start_B, scale, implementation, prefixes=prefixes)

        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    return call(query, key, value, segments_BM, start_B, grad)


def plain(*given):
    *inputs, grad = given
    return reference.forward(*inputs), *reference.backward(*inputs, grad)


def check(results, given, case, dtype):
    """Raises an error if results differ from the plain loop."""
    for name, got, expected in zip(("mixed", "query", "key", "value"), results, plain(*given)):
        assert got.dtype == jnp.dtype(dtype) and got.shape == expected.shape
        allowed = TOLERANCE[dtype] + ROUNDED * CASES[case][-1]
        largest = max(np.abs(expected).max(), given[5] * np.abs(given[1]).max())  # 0 for a query that sees one key
        assert np.abs(np.asarray(got, np.float64) - expected).max() <= allowed * largest, name


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in TOLERANCE if dtype == "float32" or case not in LENGTHS],
)
@pytest.mark.parametrize("implementation", HERE)
def test_values_and_gradients_equal_the_plain_loop(implementation, case, dtype):
    given = random_inputs(case, dtype)
    check(run(implementation, *given), given, case, dtype)


@pytest.mark.parametrize("implementation", HERE)
def test_without_segments_a_row_is_one_segment(implementation):
    given = random_inputs("from_a_block_on", "float32")
    without = run(implementation, *given[:3], None, *given[4:])
    for one, other in zip(without, run(implementation, *given)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", ["prefix_segments", "every_row_from_elsewhere"])
def test_gradients_of_the_plain_loop_equal_a_dense_softmax(case):
    query, key, value, segments_BM, start_B, scale, grad = random_inputs(case, "float32")
    position_BT = start_B[:, None] + np.arange(query.shape[1])[None, :]
    segment_BT1 = np.take_along_axis(segments_BM, position_BT, axis=1)[:, :, None]
    seen_BTM = (segment_BT1 == segments_BM[:, None, :]) | (segments_BM < 0)[:, None, :]
    seen_BTM &= position_BT[:, :, None] >= np.arange(key.shape[1])[None, None, :]

    @jax.jit
    def dense(query, key, value):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        score_BHTM = scale * jnp.einsum("btha,bmha->bhtm", query, key)
        share_BHTM = jax.nn.softmax(jnp.where(seen_BTM[:, None], score_BHTM, -jnp.inf), axis=-1)
        return jnp.einsum("bhtm,bmhx->bthx", share_BHTM, value)

    mixed, pull = jax.vjp(dense, query, key, value)
    for got, expected in zip((mixed, *pull(grad)), plain(query, key, value, segments_BM, start_B, scale, grad)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", HERE)
def test_parts_of_the_queries_get_the_results_of_all_together(implementation, dtype):
    """There are keys beyond each part."""
    query, key, value, segments_BM, start_B, scale, grad = random_inputs("several_blocks", dtype)
    whole, *_ = run(implementation, query, key, value, segments_BM, start_B, scale, grad)
    for begin, end in ((0, 100), (100, 357), (357, 512)):
        part = (query[:, begin:end], key, value, segments_BM, start_B + begin, scale, grad[:, begin:end])
        mixed, *_ = run(implementation, *part)
        if implementation == "native":
            np.testing.assert_array_equal(mixed, whole[:, begin:end])
        difference = np.abs(np.asarray(mixed - whole[:, begin:end], np.float32)).max()
        assert difference <= TOLERANCE[dtype] * np.abs(np.asarray(whole, np.float32)).max()


@pytest.mark.parametrize("implementation", HERE)
def test_keys_after_the_last_query_change_nothing(implementation):
    query, key, value, segments_BM, start_B, scale, grad = random_inputs("every_row_from_elsewhere", "float32")
    unseen_BM = np.arange(key.shape[1])[None, :] >= start_B[:, None] + query.shape[1]
    key_2, value_2 = (jnp.where(unseen_BM[:, :, None, None], 100 * x + 1, x) for x in (key, value))
    once = run(implementation, query, key, value, segments_BM, start_B, scale, grad)
    again = run(implementation, query, key_2, value_2, segments_BM, start_B, scale, grad)
    for one, other in zip(once, again):
        np.testing.assert_array_equal(one, other)
    for key_grad in again[2:]:
        assert unseen_BM.any() and not np.asarray(key_grad)[unseen_BM].any()


@pytest.mark.parametrize("implementation", HERE)
def test_unseen_positions_change_nothing_bit_for_bit(implementation):
    """Other segments and later positions, which get no gradient either."""
    query, key, value, segments_BM, start_B, scale, grad = random_inputs("several_segments", "float32")
    at = 90
    seen_BM = (segments_BM == segments_BM[:, at : at + 1]) & (np.arange(segments_BM.shape[1]) <= at)[None]
    assert seen_BM.sum(axis=1).min() > 1 and seen_BM.sum(axis=1).max() < at
    key_2, value_2 = (jnp.where(seen_BM[:, :, None, None], x, 100 * x + 1) for x in (key, value))
    only_at = grad * (np.arange(grad.shape[1]) == at)[None, :, None, None]
    once = run(implementation, query, key, value, segments_BM, start_B, scale, only_at)
    again = run(implementation, query, key_2, value_2, segments_BM, start_B, scale, only_at)
    np.testing.assert_array_equal(once[0][:, at], again[0][:, at])
    for one, other in zip(once[1:], again[1:]):
        np.testing.assert_array_equal(one, other)
    for key_grad in again[2:]:
        assert not np.asarray(key_grad)[~seen_BM].any()


@pytest.mark.parametrize("implementation", HERE)
def test_blocks_of_later_positions_are_not_multiplied(implementation):
    """NaN there would spread, even times a share of zero."""
    query, key, value, segments_BM, start_B, scale, grad = random_inputs("several_blocks", "float32")
    value = value.at[:, 384:].set(np.nan)
    mixed, query_grad, _, _ = run(
        implementation, query, key, value, segments_BM, start_B, scale, grad.at[:, 384:].set(0)
    )
    for got in (mixed, query_grad):
        assert np.isnan(got[:, 384:]).all() and np.isfinite(got[:, :256]).all()


@pytest.mark.parametrize("implementation", HERE)
def test_a_nan_score_is_not_hidden(implementation):
    """Divergence in training must be visible."""
    query, key, value, segments_BM, start_B, scale, grad = random_inputs("not_a_multiple_of_the_block", "float32")
    for bad in (np.nan, np.inf):
        mixed, *grads = run(
            implementation, query.at[0, 150, 1, 0].set(bad), key, value, segments_BM, start_B, scale, grad
        )
        is_nan = np.isnan(mixed)
        assert is_nan[0, 150, 1].all() and is_nan.sum() == is_nan[0, 150, 1].size
        assert all(np.isnan(grad).any() for grad in grads)


@pytest.mark.parametrize("implementation", HERE)
def test_inputs_of_several_dtypes(implementation):
    query, key, value, segments_BM, start_B, scale, grad = random_inputs("one_segment", "float32")
    value, grad = value.astype("bfloat16"), grad.astype("bfloat16")
    mixed, *grads = run(implementation, query, key, value, segments_BM, start_B, scale, grad)
    assert [x.dtype.name for x in (mixed, *grads)] == ["bfloat16", "float32", "float32", "bfloat16"]
    expected = reference.forward(query, key, value, segments_BM, start_B, scale)
    np.testing.assert_allclose(np.asarray(mixed, np.float64), expected, rtol=0, atol=2e-2 * np.abs(expected).max())


def test_integers_are_refused():
    ones = jnp.ones((1, 4, 2, 8), jnp.int32)
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got int32"):
        causal_attention(ones, ones, ones, None, ones[:, 0, 0, 0], 1.0, "native", prefixes=False)


def lowered(implementation, length):
    """The lowered forward pass and gradient for `length` positions."""
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def mix(*inputs):
        return causal_attention(*inputs, None, jnp.zeros(1, jnp.int32), 1.0, implementation, prefixes=False)

    def with_gradient(query, key, value, grad):
        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    return jax.jit(with_gradient).lower(x, x, x, x)


@pytest.mark.parametrize("implementation", HERE)
def test_no_scores_are_kept(implementation):
    """Allocated memory grows with the length, not with its square."""

    def size(length):
        return lowered(implementation, length).compile().memory_analysis().temp_size_in_bytes

    assert size(4096) < 2.2 * size(2048)


@pytest.mark.parametrize("implementation", HERE)
def test_a_longer_sequence_does_not_make_a_longer_program(implementation):
    lines = [len(lowered(implementation, length).as_text().splitlines()) for length in (2048, 32768)]
    assert lines[1] <= 1.05 * lines[0]


def digest():
    """A digest of results and gradients for many work items, and the number of threads."""
    given = random_inputs("prefix_segments", "float32")
    rows = [jnp.concatenate([x] * 4) for x in given[:5]]
    results = run("native", *rows, given[5], jnp.concatenate([given[6]] * 4))
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
