"""The Hopper kernels of grouped matmul against the plain loop, interpreted on a CPU; and the cases that they refuse."""

import functools
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.kernels.grouped_matmul import pallas_gpu, pallas_gpu_rows, reference
from moe_jax.kernels.grouped_matmul.pallas_gpu import SEVERAL, Tiles
from moe_jax.kernels.grouped_matmul.pallas_gpu_pieces import ProductPieces

TOLERANCE = 8e-3  # bfloat16: largest difference over the largest value of the reference
D, F, LAYERS = 128, 192, 2
ONE_WARPGROUP, TWO_WARPGROUPS = Tiles(64, 64, 64, 2), Tiles(128, 128, 64, 3)
# rows, group sizes, tiles
CASES = {
    "even": (64, [16, 16, 16, 16], ONE_WARPGROUP),
    "skewed": (200, [1, 150, 37, 12], TWO_WARPGROUPS),
    "empty_groups": (40, [0, 25, 0, 15], ONE_WARPGROUP),
    "one_expert": (203, [0, 0, 203, 0], TWO_WARPGROUPS),
    "dropped_rows": (150, [5, 0, 61, 9], ONE_WARPGROUP),
    "as_many_as_several": (70, [41, 0, 9, 20], SEVERAL),
    "nothing_kept": (16, [0, 0, 0, 0], ONE_WARPGROUP),
    "fewer_rows_than_a_copy": (4, [1, 0, 1, 2], ONE_WARPGROUP),
}
new_enough = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels ask for jax 0.11")


@pytest.fixture
def interpreted():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode():
        yield


def random_inputs(num_rows, num_experts, dtype=jnp.bfloat16):
    rng = np.random.default_rng(num_rows)
    shapes = (num_rows, D), (LAYERS, num_experts, F, D), (num_rows, F)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def assert_close(got, expected):
    scale = np.abs(expected).max(initial=0)
    assert np.abs(np.asarray(got, np.float32) - expected).max(initial=0) <= TOLERANCE * scale


def exact(*arrays):
    return tuple(np.asarray(array, np.float32) for array in arrays)


@new_enough
@pytest.mark.parametrize("case", CASES)
def test_forward(case, interpreted):
    """NaN in places that must not be read would spread: NaN times zero is NaN."""
    num_rows, sizes, tiles = CASES[case]
    rows, weights, _ = random_inputs(num_rows, len(sizes))
    sizes = np.asarray(sizes, np.int32)
    rows = rows.at[sizes.sum() :].set(jnp.nan)
    weights = weights.at[:, sizes == 0].set(jnp.nan)
    call = jax.jit(functools.partial(pallas_gpu.forward, tiles=tiles, num_cores=2))
    got = call(rows, weights, jnp.asarray(sizes), jnp.int32(1))
    assert got.dtype == rows.dtype
    assert_close(got, reference.forward(*exact(rows, weights), sizes, 1))


@new_enough
@pytest.mark.parametrize(("num_cores", "width"), [(1, 64), (6, 32)])
@pytest.mark.parametrize("product", ["forward", "gated"])
def test_one_expert_is_spread_over_all_cores(product, num_cores, width, interpreted):
    """In pieces of each width that there is: 192 columns in 3 or in 6 pieces."""
    sizes, gated = [0, 5, 0], product == "gated"
    tiles = Tiles(64, 128 if gated else 64, 64, 2)
    rows, weights, _ = random_inputs(16, 2 * len(sizes))
    halves = weights.reshape(LAYERS, len(sizes), 2, F, D)
    weights = halves if gated else halves[:, :, 0]
    rows = rows.at[5:].set(jnp.nan)
    pieces = ProductPieces.of(rows, weights, tiles, num_cores, gated=gated)
    tables = pieces.tables(jnp.asarray(sizes, jnp.int32), 1)
    assert pieces.widths[int(pieces.narrower(tables))] == width
    call = jax.jit(functools.partial(getattr(pallas_gpu, product), tiles=tiles, num_cores=num_cores))
    got = call(rows, weights, jnp.asarray(sizes, jnp.int32), jnp.int32(1))
    gate, up = (reference.forward(*exact(rows, halves[:, :, i]), np.asarray(sizes), 1) for i in range(2))
    assert_close(got, gate / (1 + np.exp(-gate)) * up if gated else gate)


@new_enough
def test_gated(interpreted):
    num_rows, sizes, _ = CASES["skewed"]
    rows, weights, _ = random_inputs(num_rows, 2 * len(sizes))
    weights = weights.reshape(LAYERS, len(sizes), 2, F, D)
    call = jax.jit(functools.partial(pallas_gpu.gated, tiles=TWO_WARPGROUPS, num_cores=2))
    got = call(rows, weights, jnp.asarray(sizes, jnp.int32), jnp.int32(1))
    rows, weights = exact(rows, weights)
    gate, up = (reference.forward(rows, weights[:, :, i], sizes, 1) for i in range(2))
    assert_close(got, gate / (1 + np.exp(-gate)) * up)


@new_enough
@pytest.mark.parametrize("case", ["skewed", "dropped_rows"])
def test_gradients(case, interpreted):
    num_rows, sizes, tiles = CASES[case]
    rows, weights, out_grad = random_inputs(num_rows, len(sizes))
    call = jax.jit(functools.partial(pallas_gpu.backward, tiles=tiles, num_cores=2))
    got = call(rows, weights, jnp.asarray(sizes, jnp.int32), jnp.int32(1), out_grad)
    rows, weights, out_grad = exact(rows, weights, out_grad)
    for gradient, expected in zip(got, reference.backward(rows, weights, sizes, 1, out_grad)):
        assert_close(gradient, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
    """With the tiles and the cores that a model's step has."""
    num_rows, sizes, _ = CASES[case]
    rows, halves, out_grad = random_inputs(num_rows, 2 * len(sizes))
    halves = halves.reshape(LAYERS, len(sizes), 2, F, D)
    operands = rows, halves[:, :, 0], jnp.asarray(sizes, jnp.int32), jnp.int32(1)
    exact_rows, exact_halves, exact_grad = exact(rows, halves, out_grad)
    gate, up = (reference.forward(exact_rows, exact_halves[:, :, i], sizes, 1) for i in range(2))
    assert_close(jax.jit(pallas_gpu.forward)(*operands), gate)
    assert_close(jax.jit(pallas_gpu.gated)(rows, halves, *operands[2:]), gate / (1 + np.exp(-gate)) * up)
    expected = reference.backward(exact_rows, exact_halves[:, :, 0], sizes, 1, exact_grad)
    for gradient, one in zip(jax.jit(pallas_gpu.backward)(*operands, out_grad), expected, strict=True):
        assert_close(gradient, one)


@new_enough
@pytest.mark.interpreted
@pytest.mark.slow
def test_drawn_groups(interpreted):
    """Compiled once for all groups that are drawn."""
    rows, weights, out_grad = random_inputs(104, 3)
    settings = {"tiles": ONE_WARPGROUP, "num_cores": 2}
    forward, backward = (jax.jit(functools.partial(f, **settings)) for f in (pallas_gpu.forward, pallas_gpu.backward))
    exact_rows, exact_weights, exact_grad = exact(rows, weights, out_grad)

    @hypothesis.settings(max_examples=6)
    @hypothesis.given(st.lists(st.integers(0, 34), min_size=3, max_size=3))
    def check(sizes):
        operands = rows, weights, jnp.asarray(sizes, jnp.int32), jnp.int32(0)
        assert_close(forward(*operands), reference.forward(exact_rows, exact_weights, sizes, 0))
        expected_gradients = reference.backward(exact_rows, exact_weights, sizes, 0, exact_grad)
        for gradient, expected in zip(backward(*operands, out_grad), expected_gradients):
            assert_close(gradient, expected)

    check()


@new_enough
def test_tiles_hold_every_row_once():
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def every_tile(sizes_E, num_rows, size):
        def at(tile):
            return pallas_gpu_rows.tile_at([column_T[tile] for column_T in cut], tile, 4, num_rows, size)

        cut = pallas_gpu_rows.row_tiles(sizes_E, num_rows, size)
        return jax.vmap(at)(jnp.arange(pallas_gpu_rows.most_tiles(4, num_rows, size)))

    rng = np.random.default_rng(0)
    for num_rows, size in ((608, 64), (608, 128), (56, 64)):
        for _ in range(40):
            sizes = rng.integers(0, num_rows // 4, size=4) * rng.integers(0, 2, size=4)
            owner = np.repeat(np.arange(5), [*sizes, num_rows - sizes.sum()])
            served = np.zeros(num_rows, int)
            for group, start, begin, end in np.stack(every_tile(jnp.asarray(sizes, jnp.int32), num_rows, size), axis=1):
                assert start % 8 == 0 and 0 <= begin <= end <= size
                served[start + begin : start + end] += 1
                assert (owner[start + begin : start + end] == group).all()
            assert (served == 1).all()


def test_unsupported_cases_are_refused_in_one_line(monkeypatch):
    rows, weights, _ = random_inputs(8, 2)
    sizes = jnp.asarray([3, 5], jnp.int32)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    with pytest.raises(ValueError, match="multiplies bfloat16 and float16, not float32; padded would run"):
        pallas_gpu.forward(rows.astype(jnp.float32), weights.astype(jnp.float32), sizes, 0)
    with pytest.raises(ValueError, match="needs matrices in multiples of 64 by 64, not 192 by 100; padded would run"):
        pallas_gpu.forward(rows[:, :100], weights[..., :100], sizes, 0)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ValueError, match=r"needs jax 0\.11 or newer, not"):
        pallas_gpu.forward(rows, weights, sizes, 0)


def test_a_gpu_without_wgmma_is_refused_in_one_line(monkeypatch):
    rows, weights, _ = random_inputs(8, 2)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.0", device_kind="A100")])
    for product, operand in ((pallas_gpu.forward, weights), (pallas_gpu.gated, jnp.stack([weights] * 2, axis=2))):
        with pytest.raises(ValueError) as refusal:
            product(rows, operand, jnp.asarray([3, 5], jnp.int32), 0)
        reason = "needs a Hopper GPU (compute capability 9.0), not 8.0"
        assert str(refusal.value) == f"pallas_gpu {reason}; padded would run"
