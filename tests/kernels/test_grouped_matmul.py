"""Every implementation of grouped matmul against the plain loop: forward, gradients, and the cost of dropped rows."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.grouped_matmul import native, reference, tiles
from moe_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul, takes
from moe_jax.kernels.quantized import DTYPES as EIGHT_BITS
from moe_jax.kernels.quantized import Quantized
from tests.kernels.eight_bits import random_weights

# largest difference over the largest value of the reference
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
# rows, group sizes
CASES = {
    "even": (64, [16, 16, 16, 16]),
    "skewed": (96, [1, 80, 3, 12]),
    "empty_groups": (40, [0, 25, 0, 15]),
    "one_expert": (33, [0, 0, 33, 0]),
    "not_a_multiple_of_the_block": (101, [50, 7, 31, 13]),
    "dropped_rows": (64, [5, 0, 20, 9]),
    "nothing_kept": (16, [0, 0, 0, 0]),
    "single_row": (1, [0, 1, 0, 0]),
    "one_row_each": (4, [1, 1, 1, 1]),
    "more_than_a_panel": (6000, [5900, 37, 0, 60]),
}
LAYERS, D, F = 3, 24, 40
ON_A_CPU = [name for name in IMPLEMENTATIONS if not name.startswith("pallas")]  # their own tests interpret them


EIGHT_BITS_ON_A_CPU = [name for name in ON_A_CPU if takes(name, "int8")]


def random_inputs(num_rows, num_experts, dtype, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, D)).astype(dtype)
    weights = rng.standard_normal((LAYERS, num_experts, F, D)).astype(dtype)
    out_grad = rng.standard_normal((num_rows, F)).astype(dtype)
    return rows, weights, out_grad


def assert_close(got, expected, dtype):
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    scale = np.abs(expected).max(initial=0)
    assert np.abs(got - expected).max(initial=0) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ON_A_CPU)
def test_forward(implementation, case, dtype):
    num_rows, sizes = CASES[case]
    rows, weights, _ = random_inputs(num_rows, len(sizes), jnp.dtype(dtype))
    sizes = np.asarray(sizes, np.int32)
    for layer in (0, 2):
        got = jax.jit(grouped_matmul, static_argnums=4)(rows, weights, sizes, layer, implementation)
        assert got.dtype == rows.dtype
        assert_close(got, reference.forward(rows, weights, sizes, layer), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_native_returns_its_float32_sums(dtype):
    rows, weights, _ = random_inputs(33, 4, jnp.dtype(dtype))
    sizes = np.array([3, 0, 20, 9], np.int32)
    got = native.forward(rows, weights, sizes, 1, jnp.float32)
    assert got.dtype == jnp.float32
    exact = reference.forward(rows.astype(np.float32), weights.astype(np.float32), sizes, 1)
    assert_close(got, exact, "float32")


def test_native_refuses_rows_of_another_depth():
    rows, weights, _ = random_inputs(4, 4, jnp.dtype("float32"))
    half = rows.shape[1] // 2
    with pytest.raises(ValueError, match=rf"rows of {half} numbers, but weights of shape \("):
        native.forward(rows[:, :half], weights, np.ones(4, np.int32), 1)


def test_native_refuses_an_output_of_another_half():
    rows, weights, _ = random_inputs(4, 4, jnp.dtype("float32"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected an output of float32, or of the type of the rows"):
        native.forward(rows, weights, np.ones(4, np.int32), 1, jnp.bfloat16).block_until_ready()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("depth", [7, 64, 530, 2100])
@pytest.mark.parametrize("columns", [5, 49, 300])
def test_native_packs_rows_that_do_not_fill_a_block(columns, depth, dtype):
    rng, sizes = np.random.default_rng(0), np.array([3, 40, 0, 13, 12, 150], np.int32)
    rows = rng.standard_normal((sizes.sum() + 2, depth)).astype(dtype)
    weights = rng.standard_normal((2, len(sizes), columns, depth)).astype(dtype)
    got = native.forward(rows, weights, sizes, 1)
    assert_close(got, reference.forward(rows, weights, sizes, 1), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weights_dtype", EIGHT_BITS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", EIGHT_BITS_ON_A_CPU)
def test_weights_in_eight_bits(implementation, case, weights_dtype, dtype):
    num_rows, sizes = CASES[case]
    rows, _, _ = random_inputs(num_rows, len(sizes), jnp.dtype(dtype))
    weights, wide = random_weights((LAYERS, len(sizes), F, D), weights_dtype)
    sizes = np.asarray(sizes, np.int32)
    got = jax.jit(grouped_matmul, static_argnums=4)(rows, weights, sizes, 2, implementation)
    assert got.dtype == rows.dtype
    expected = reference.forward(rows.astype(np.float32), wide, sizes, 2)
    assert_close(got, expected, dtype)
    np.testing.assert_allclose(reference.forward(rows.astype(np.float32), weights, sizes, 2), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weights_dtype", EIGHT_BITS)
@pytest.mark.parametrize(("columns", "depth", "block"), [(5, 7, None), (49, 530, (7, 106)), (300, 2100, (50, 420))])
def test_native_packs_blocks_that_share_a_scale(columns, depth, block, weights_dtype, dtype):
    rng, sizes = np.random.default_rng(0), np.array([3, 40, 0, 13, 1, 150], np.int32)
    rows = rng.standard_normal((sizes.sum() + 2, depth)).astype(dtype)
    weights, wide = random_weights((2, len(sizes), columns, depth), weights_dtype, block)
    got = native.forward(rows, weights, sizes, 1)
    assert_close(got, reference.forward(rows.astype(np.float32), wide, sizes, 1), dtype)


def test_native_reads_every_number_of_eight_bits():
    """All 254 finite FP8 numbers, denormal ones included, and all of int8, each times one, in float32."""
    every = np.arange(256, dtype=np.uint8)
    every[(every & 0x7F) == 0x7F] = 0
    for bits in (every.view("float8_e4m3fn"), every.view(np.int8)):
        values = jnp.asarray(bits.reshape(1, 1, 256, 1))
        got = native.forward(jnp.ones((1, 1)), Quantized(values, jnp.ones((1, 1, 1, 1))), jnp.array([1]), 0)
        np.testing.assert_array_equal(got[0], bits.astype(np.float32))
        in_rows = Quantized(values.reshape(1, 1, 4, 64), jnp.ones((1, 1, 1, 1)))
        for number in range(64):  # the order of numbers in a pack
            row = jnp.zeros((1, 64), jnp.bfloat16).at[0, number].set(1)
            for rows in (row, jnp.tile(row, (30, 1))):
                got = native.forward(rows, in_rows, jnp.array([len(rows)]), 0)
                np.testing.assert_array_equal(
                    got[-1].astype(np.float32), in_rows.values[0, 0, :, number].astype(np.float32)
                )


@pytest.mark.parametrize("weights_dtype", EIGHT_BITS)
@pytest.mark.parametrize("implementation", EIGHT_BITS_ON_A_CPU)
def test_experts_in_eight_bits_without_work_are_not_touched(implementation, weights_dtype):
    rows, _, _ = random_inputs(32, 4, np.float32)
    weights, _ = random_weights((LAYERS, 4, F, D), weights_dtype)
    weights = Quantized(weights.values, weights.scale.at[:, jnp.array([1, 3])].set(jnp.nan))
    rows[15:] = np.nan
    got = grouped_matmul(rows, weights, np.array([6, 0, 9, 0], np.int32), jnp.int32(0), implementation)
    assert np.isfinite(got).all()
    assert (np.asarray(got)[15:] == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ON_A_CPU)
def test_gradients(implementation, case):
    num_rows, sizes = CASES[case]
    rows, weights, out_grad = random_inputs(num_rows, len(sizes), np.float32)
    sizes = np.asarray(sizes, np.int32)

    def gradients(rows, weights, out_grad):
        _, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, sizes, jnp.int32(1), implementation), rows, weights)
        return pull(out_grad)

    rows_grad, weights_grad = jax.jit(gradients)(rows, weights, out_grad)
    expected_rows_grad, expected_weights_grad = reference.backward(rows, weights, sizes, 1, out_grad)
    assert_close(rows_grad, expected_rows_grad, "float32")
    assert_close(weights_grad, expected_weights_grad, "float32")


def test_reference_gradient_is_that_of_its_forward():
    rows, weights, out_grad = (part.astype(np.float64) for part in random_inputs(12, 4, np.float32))
    sizes, layer, step = np.array([3, 0, 5, 2]), 1, 1e-3

    def value(rows, weights):
        return (reference.forward(rows, weights, sizes, layer).astype(np.float64) * out_grad).sum()

    rows_grad, weights_grad = reference.backward(rows, weights, sizes, layer, out_grad)
    rng = np.random.default_rng(1)
    toward_rows, toward_weights = rng.standard_normal(rows.shape), rng.standard_normal(weights.shape)
    slope = value(rows + step * toward_rows, weights) - value(rows - step * toward_rows, weights)
    np.testing.assert_allclose(slope / (2 * step), (rows_grad * toward_rows).sum(), rtol=1e-3)
    slope = value(rows, weights + step * toward_weights) - value(rows, weights - step * toward_weights)
    np.testing.assert_allclose(slope / (2 * step), (weights_grad * toward_weights).sum(), rtol=1e-3)


@hypothesis.given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9), spare=st.integers(0, 30))
def test_blocks_cover_every_kept_row_once(sizes, spare):
    num_rows = sum(sizes) + spare
    hypothesis.assume(num_rows > 0)
    size = tiles.block_size(num_rows, len(sizes))
    groups = tiles.busy_groups(jnp.asarray(sizes, jnp.int32))
    served = np.full(num_rows, -1)
    for i in range(int(groups.count)):
        expert, first, last = (int(part[i]) for part in groups[1:])
        for number in range(int(tiles.num_blocks(first, last, size))):
            start, own = tiles.block(first, last, number, size, num_rows)
            assert 0 <= start <= num_rows - size
            rows = int(start) + np.flatnonzero(own)
            assert len(rows) and (served[rows] == -1).all()
            served[rows] = expert
    expected = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(served, np.r_[expected, np.full(spare, -1)])


@pytest.mark.parametrize("implementation", ["native", "blocked"])
def test_rows_and_experts_without_work_are_not_touched(implementation):
    """NaN in unused rows and experts would spread if it were read: NaN times zero is NaN."""
    rows, weights, _ = random_inputs(32, 4, np.float32)
    sizes = np.array([6, 0, 9, 0], np.int32)
    rows[15:] = np.nan
    weights[:, [1, 3]] = np.nan
    got = grouped_matmul(rows, weights, sizes, jnp.int32(0), implementation)
    assert np.isfinite(got).all()
    assert (np.asarray(got)[15:] == 0).all()


def test_trip_counts_follow_the_kept_rows():
    assert int(tiles.busy_groups(jnp.asarray([0, 0, 0, 0])).count) == 0
    groups = tiles.busy_groups(jnp.asarray([64, 0, 1, 0]))
    assert int(groups.count) == 2
    assert [int(tiles.num_blocks(groups.first_E[i], groups.last_E[i], 16)) for i in range(2)] == [4, 1]
