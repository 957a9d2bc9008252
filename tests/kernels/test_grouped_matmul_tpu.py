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
# group sizes; in one shape, since compiling the interpreter takes longer than running it
ROWS, CASES = (
    104,
    {
        "even": [16, 16, 16, 16],
        "skewed": [1, 80, 3, 12],
        "empty_groups": [0, 25, 0, 15],
        "one_expert": [0, 0, 33, 0],
        "not_a_multiple_of_the_block": [51, 7, 31, 15],
        "dropped_rows": [5, 0, 20, 9],
        "nothing_kept": [0, 0, 0, 0],
        "single_row": [0, 1, 0, 0],
    },
)
LAYERS, EXPERTS, D, F = 2, 4, 200, 160  # blocks of 128: the last is cut off
TILES = Tiles(rows=32, step=16, columns=128)
GRADIENT_TILES = GradientTiles(rows=32, step=16, outputs=128, inputs=128)


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


@functools.cache
def compiled(call, **settings):
    return jax.jit(functools.partial(call, **settings))


def random_inputs(sizes, dtype, matrices=(F, D)):
    """Operands; those that may not be read are NaN, which would spread: NaN times zero is NaN."""
    rng, sizes = np.random.default_rng(sum(sizes)), np.asarray(sizes, np.int32)
    rows = rng.standard_normal((ROWS, D)).astype(dtype)
    weights = rng.standard_normal((LAYERS, EXPERTS, *matrices)).astype(dtype)
    out_grad = rng.standard_normal((ROWS, F)).astype(dtype)
    for array in (rows, out_grad):
        array[sizes.sum() :] = np.nan
    weights[0] = np.nan
    weights[:, sizes == 0] = np.nan
    return rows, weights, out_grad, sizes


def assert_close(got, expected, dtype):
    assert got.dtype == dtype
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    scale = np.abs(expected).max(initial=0)
    assert np.abs(got - expected).max(initial=0) <= TOLERANCE[dtype] * scale


def check_forward(sizes, dtype):
    rows, weights, _, sizes = random_inputs(sizes, dtype)
    got = compiled(pallas_tpu.forward, tiles=TILES)(rows, weights, sizes, 1)
    assert_close(got, reference.forward(rows, weights, sizes, 1), dtype)


def check_gated(sizes, dtype):
    rows, weights, _, sizes = random_inputs(sizes, dtype, (2, F, D))
    got = compiled(pallas_tpu.gated, tiles=TILES)(rows, weights, sizes, 1)
    rows, weights = rows.astype(np.float64), weights.astype(np.float64)
    gate, up = (reference.forward(rows, weights[:, :, i], sizes, 1) for i in range(2))
    assert_close(got, gate / (1 + np.exp(-gate)) * up, dtype)


def check_rows_gradient(sizes, dtype):
    rows, weights, out_grad, sizes = random_inputs(sizes, dtype)
    got = compiled(pallas_tpu.rows_gradient, tiles=TILES)(out_grad, weights, sizes, 1)
    assert_close(got, reference.backward(rows, weights, sizes, 1, out_grad)[0], dtype)


def check_weights_gradient(sizes, dtype):
    rows, weights, out_grad, sizes = random_inputs(sizes, dtype)
    got = compiled(pallas_tpu.weights_gradient, tiles=GRADIENT_TILES)(rows, sizes, out_grad)
    assert_close(got, reference.backward(rows, weights, sizes, 1, out_grad)[1][1], dtype)


CHECKS = [check_forward, check_gated, check_rows_gradient, check_weights_gradient]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_products(check, case, dtype):
    check(CASES[case], dtype)


@pytest.mark.parametrize("check", CHECKS)
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(sizes=st.lists(st.integers(0, ROWS // EXPERTS), min_size=EXPERTS, max_size=EXPERTS))
def test_drawn_group_sizes(check, sizes):
    check(sizes, "float32")


def test_gradients_of_the_operation():
    """Through the seam, in the blocks of the default rule, with fewer rows than a block."""
    rng, sizes = np.random.default_rng(0), np.array([2, 0, 3], np.int32)
    rows, weights, out_grad = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((6, 24), (2, 3, 40, 24), (6, 40))
    )

    @jax.jit
    def gradients(rows, weights, out_grad):
        out, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, sizes, jnp.int32(1), "pallas_tpu"), rows, weights)
        return out, pull(out_grad)

    out, got = gradients(rows, weights, out_grad)
    assert_close(out, reference.forward(rows, weights, sizes, 1), "float32")
    for gradient, expected in zip(got, reference.backward(rows, weights, sizes, 1, out_grad)):
        assert_close(gradient, expected, "float32")


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(sizes=st.lists(st.integers(0, 40), min_size=6, max_size=6))
def test_visits_hold_every_row_once(sizes):
    num_rows, size = 256, 16
    for visits_of in (pallas_tpu_visits.for_rows, pallas_tpu_visits.for_experts):
        visits = compiled(visits_of, num_rows=num_rows, size=size)(np.asarray(sizes, np.int32))
        count, (expert, block, out_block, begin, end) = int(visits.count), (np.asarray(x) for x in visits[1:])
        assert count <= len(expert)
        served = np.full(num_rows, -1)
        for visit in range(count):
            own = out_block[visit] * size + np.arange(begin[visit], end[visit])
            assert (served[own] == -1).all()
            assert block[visit] == out_block[visit] or not len(own)
            served[own] = expert[visit]
        np.testing.assert_array_equal(served[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
        assert (served[sum(sizes) :] == -1).all()
        assert (np.diff(out_block[:count]) >= 0).all() and (np.diff(expert[:count]) >= 0).all()
        visited = out_block if visits_of is pallas_tpu_visits.for_rows else expert
        blocks = num_rows // size if visits_of is pallas_tpu_visits.for_rows else len(sizes)
        assert set(visited[:count]) == set(range(blocks))


def test_what_the_kernels_lack_is_refused_in_one_line():
    rows, weights, _, sizes = random_inputs(CASES["even"], np.float16)
    with pytest.raises(ValueError, match="multiplies bfloat16 and float32, not float16; ragged_dot would run"):
        pallas_tpu.forward(rows, weights, sizes, 1)
    with pytest.raises(ValueError, match="expected rows in the weights' float32, got float16"):
        pallas_tpu.forward(rows, weights.astype(np.float32), sizes, 1)
    with pytest.raises(ValueError, match="of depth 200000 are too deep for vector memory of 63 MiB; ragged_dot takes"):
        pallas_tpu_tiles.for_product(8, 200_000, 256, 1, 2, 1)
