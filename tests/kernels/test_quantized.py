"""Quantising against a plain loop, the bounds of its error, and that nothing else takes weights in eight bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.kernels import quantized
from moe_jax.kernels.expert_ffn.api import expert_ffn
from moe_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul, takes
from moe_jax.kernels.quantized import Quantized
from tests.kernels.eight_bits import LARGEST, plain, random_weights

SHAPES = [(5, 7), (16, 16), (40, 24), (33, 50)]


def plain_quantize(matrix, dtype, block):
    """Block by block, number by number."""
    values = np.zeros(matrix.shape, np.float32)
    scale = np.ones([-(-size // one) for size, one in zip(matrix.shape, block)], np.float32)
    for down, across in np.ndindex(scale.shape):
        rows, columns = slice(down * block[0], (down + 1) * block[0]), slice(across * block[1], (across + 1) * block[1])
        largest = max(abs(float(number)) for number in matrix[rows, columns].flat)
        if largest:
            scale[down, across] = np.float32(largest) / np.float32(LARGEST[dtype])
        for place in np.ndindex(matrix[rows, columns].shape):
            exact = np.float32(matrix[rows, columns][place]) / scale[down, across]
            near = (
                round(float(exact)) if dtype == "int8" else float(ml_dtypes.float8_e4m3fn(min(max(exact, -448), 448)))
            )
            values[rows, columns][place] = near
    return values, scale


@pytest.mark.parametrize("dtype", quantized.DTYPES)
@pytest.mark.parametrize("block", [(1, 50), (8, 16), (128, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_as_by_a_plain_loop_within_half_a_step(shape, block, dtype):
    block = (block[0], min(block[1], shape[1])) if block[1] == 50 else block
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix[0, : block[1]] = 0
    values, scale = quantized.quantize(matrix, dtype, block)
    expected_values, expected_scale = plain_quantize(matrix, dtype, block)
    assert values.dtype == np.dtype(dtype) and scale.dtype == np.float32
    np.testing.assert_array_equal(values.astype(np.float32), expected_values)
    np.testing.assert_array_equal(scale, expected_scale)

    even = quantized.even_block(block, *shape)
    spread = quantized.spread(scale, block, shape, even)
    assert all(size % one == 0 for size, one in zip(shape, even))
    wide = plain(values, spread, even)
    scale_of_number = quantized.spread(scale, block, shape)
    bound = scale_of_number * 0.5
    if dtype == "float8_e4m3fn":  # half a step: of three bits of mantissa, or of the smallest numbers
        bound = np.maximum(np.abs(matrix) * 2.0**-4, scale_of_number * 2.0**-10)
    assert (np.abs(wide - matrix) <= bound * (1 + 1e-5)).all()
    got = quantized.dequantize(jnp.asarray(values), jnp.asarray(spread), jnp.float32)
    np.testing.assert_allclose(got, wide, rtol=1e-6)


def test_a_block_in_memory_is_within_one_block_and_divides_the_matrix():
    assert quantized.even_block((128, 128), 2048, 7168) == (128, 128)
    assert quantized.even_block((128, 128), 1408, 2048) == (128, 128)
    assert quantized.even_block((128, 128), 48, 320) == (48, 64)
    assert quantized.even_block((1, 768), 2048, 768) == (1, 768)


def test_what_is_not_finite_is_seen_in_the_scale():
    for wrong in (np.nan, np.inf):
        matrix = np.ones((4, 4), np.float32)
        matrix[2, 1] = wrong
        _, scale = quantized.quantize(matrix, "int8", (1, 4))
        assert np.flatnonzero(~np.isfinite(scale)).tolist() == [2]


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if not takes(name, "int8")])
def test_the_others_refuse_by_name(implementation):
    weights, _ = random_weights((1, 2, 8, 8), "int8")
    with pytest.raises(ValueError, match=rf"{implementation} takes no weights in eight bits \(int8\): .*native"):
        grouped_matmul(jnp.ones((4, 8)), weights, jnp.array([2, 2]), 0, implementation)
    gate_up = Quantized(weights.values[:, :, None], weights.scale[:, :, None])
    with pytest.raises(ValueError, match=rf"{implementation} takes no weights in eight bits"):
        expert_ffn(jnp.ones((4, 8)), gate_up, weights, jnp.array([2, 2]), 0, implementation)


@pytest.mark.parametrize("implementation", ["native", "pallas_tpu"])
def test_there_is_no_gradient(implementation):
    weights, _ = random_weights((1, 2, 8, 8), "int8")
    gate_up = Quantized(*(jnp.concatenate([part[:, :, None]] * 2, 2) for part in (weights.values, weights.scale)))
    for product in (
        lambda rows: grouped_matmul(rows, weights, jnp.array([2, 2]), 0, implementation).sum(),
        lambda rows: expert_ffn(rows, gate_up, weights, jnp.array([2, 2]), 0, implementation).sum(),
    ):
        with pytest.raises(ValueError, match=r"no gradient: expected model\.expert_dtype=model"):
            jax.grad(product)(jnp.ones((4, 8)))
