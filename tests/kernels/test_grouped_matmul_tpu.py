"""The TPU kernels of grouped matmul against the plain loop, interpreted on a CPU; and what they refuse."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels.grouped_matmul import pallas_tpu, pallas_tpu_tiles, pallas_tpu_visits, reference
from moe_jax.kernels.grouped_matmul.api import grouped_matmul
from moe_jax.kernels.grouped_matmul.pallas_tpu_tiles import GradientTiles, Tiles

# largest difference over the largest value of the reference
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}
# rows, group sizes
CASES = {
    "even": (64, [16, 16, 16, 16]),
    "skewed": (96, [1, 80, 3, 12]),
    "empty_groups": (40, [0, 25, 0, 15]),
    "one_expert": (33, [0, 0, 33, 0]),
    "not_a_multiple_of_the_block": (101, [50, 7, 31, 13]),
    "dropped_rows": (120, [5, 0, 20, 9]),
    "nothing_kept": (40, [0, 0, 0, 0]),
    "single_row": (1, [0, 1, 0, 0]),
}
LAYERS, D, F = 2, 256, 320  # columns in blocks of 128: the last is cut off
TILES = Tiles(rows=32, step=16, columns=128)
GRADIENT_TILES = GradientTiles(rows=32, step=16, outputs=128, inputs=128)


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


def draw(num_rows, sizes, dtype):
    """Operands; those that may not be read are NaN, which would spread: NaN times zero is NaN."""
    rng, sizes = np.random.default_rng(num_rows), np.asarray(sizes, np.int32)
    rows = rng.standard_normal((num_rows, D)).astype(dtype)
    weights = rng.standard_normal((LAYERS, len(sizes), F, D)).astype(dtype)
    out_grad = rng.standard_normal((num_rows, F)).astype(dtype)
    for of_rows in (rows, out_grad):
        of_rows[sizes.sum() :] = np.nan
    weights[0] = np.nan
    weights[:, sizes == 0] = np.nan
    return rows, weights, out_grad, sizes


def assert_close(got, expected, dtype):
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    scale = np.abs(expected).max(initial=0)
    assert np.abs(got - expected).max(initial=0) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    rows, weights, _, sizes = draw(*CASES[case], jnp.dtype(dtype))
    got = jax.jit(functools.partial(pallas_tpu.forward, tiles=TILES))(rows, weights, sizes, 1)
    assert got.dtype == rows.dtype
    assert_close(got, reference.forward(rows, weights, sizes, 1), dtype)
