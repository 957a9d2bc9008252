"""The bytes that the Hopper kernels move, counted from their own pieces, against numbers by hand and the least."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import traffic
from moe_jax.kernels.grouped_matmul import pallas_gpu
from moe_jax.kernels.grouped_matmul.pallas_gpu import FEW, MANY, NUM_CORES, SEVERAL, Tiles
from moe_jax.kernels.grouped_matmul.pallas_gpu_pieces import GradientPieces, ProductPieces
from tests import launcher_module

benchmark = launcher_module.import_launcher("traffic", "benchmarks")
MOST = 1.10  # over the least bytes
SMALL = Tiles(64, 128, 64, 2)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def by_hand(sizes, num_rows, tiles, depth, width, out_columns):
    """Numbers of rows, of weights, and of the output: a plain loop over groups, tiles and columns."""
    rows = weights = stored = 0
    first = 0
    for size in sizes:
        start = first // 8 * 8
        while size and start < first + size:
            own = min(first + size, start + tiles.rows) - start
            loaded = tiles.rows if tiles.rows > 64 else -(-own // 8) * 8
            for _ in range(0, width, out_columns):
                rows += min(loaded, num_rows - start) * depth
            weights += width * depth
            start += tiles.rows
        first += size
        stored += size * width
    return rows, weights, stored


@pytest.mark.parametrize(
    ("tiles", "num_cores", "out_columns"), [(SMALL, 2, 128), (SMALL, 10, 96), (Tiles(128, 128, 64, 2), 10, 128)]
)
def test_product_as_counted_by_hand(tiles, num_cores, out_columns):
    """Rows of no expert are stored, as zeros, and not loaded; the last tile of columns is narrower than the others."""
    sizes, num_rows, depth, width = [8, 0, 150, 30], 256, 192, 320  # the first group fills a copy
    pieces = ProductPieces.of(shape(num_rows, depth), shape(2, 4, width, depth), tiles, num_cores)
    tables = pieces.tables(jnp.asarray(sizes, jnp.int32), 1)
    operands = shape(num_rows, depth), shape(8, width, depth)
    counted = traffic.count_pieces(pieces, tables, operands, shape(num_rows, width))
    rows, weights, stored = by_hand(sizes, num_rows, tiles, depth, width, out_columns)
    assert counted.fetched == (2 * rows, 2 * weights)
    assert counted.written == (2 * (stored + (num_rows - sum(sizes)) * width),)


def test_gradient_to_weights_as_counted_by_hand():
    """Each block of rows comes once for every tile of the output; blocks at the edges come from their copies."""
    sizes, num_rows, d_model, d_out = np.asarray([64, 0, 200], np.int32), 264, 320, 192
    tiles = Tiles(64, 128, 64, 2)
    gradient = GradientPieces.of(shape(num_rows, d_model), shape(num_rows, d_out), 3, tiles)
    wide = [shape(num_rows, d_out), shape(num_rows, d_model)]
    edges = [shape(3 * 2 * 64, d_out), shape(3 * 2 * 64, d_model)]
    counted = traffic.count_pieces(
        gradient, gradient.tables(jnp.asarray(sizes)), wide + edges, shape(3, d_out, d_model)
    )
    inner, at_edges = 2 * 64, (1 + 2) * 64  # blocks of 64: one of the first expert, four of the third
    tiles_down, tiles_across = 3, 3
    assert counted.fetched == (
        2 * inner * d_out * tiles_across,
        2 * inner * d_model * tiles_down,
        2 * at_edges * d_out * tiles_across,
        2 * at_edges * d_model * tiles_down,
    )
    assert counted.written == (2 * 3 * d_out * d_model,)


@pytest.mark.parametrize("tokens", (1, 8, 64))
@pytest.mark.parametrize("model", benchmark.MODELS)
def test_decoding_reads_each_expert_once_and_few_rows_twice(model, tokens):
    experts = benchmark.experts_of(model)
    sizes = benchmark.draw_sizes(experts, tokens)
    products = benchmark.products(experts, int(sizes.sum()))
    for name in ("gated", "down"):
        product = products[name]
        counted = benchmark.count_gpu(product, sizes)
        assert counted.fetched[1] == 2 * (sizes > 0).sum() * np.prod(product.matrices), name
        assert counted.total <= MOST * product.least_bytes(sizes), name


def test_half_the_experts_read_half_the_weights_at_batch_1():
    experts = benchmark.experts_of("olmoe_1b_7b")
    counted = []
    for k in (8, 4):
        sizes = np.zeros(experts.num_experts, np.int32)
        sizes[3 : 3 + 5 * k : 5] = 1
        product = benchmark.products(experts, 8)["gated"]
        counted.append(benchmark.count_gpu(product, sizes))
    assert counted[0].fetched[1] == 2 * counted[1].fetched[1] == 8 * 2 * np.prod(product.matrices)
    assert counted[1].total <= 0.55 * counted[0].total


def test_tiles_follow_the_rows_of_an_expert():
    """256 columns from 6 rows on, as the rows of 128 would be a tenth of all that moves; many rows, two warpgroups."""
    tiles = [pallas_gpu.by_rule("forward", rows, 8) for rows in (8, 47, 48, 512, 513)]
    assert tiles == [FEW, FEW, SEVERAL, SEVERAL, MANY]
    assert {tiles.columns for tiles in (FEW, SEVERAL)} == {128, 256}


@pytest.mark.parametrize(("name", "k"), [("gated", 8), ("gated", 4), ("down", 8), ("down", 4), ("down", 2)])
def test_few_experts_keep_all_processors_busy(name, k):
    """OLMoE's at batch 1: the busiest of an H100's processors has at most a tenth more columns than an even share."""
    experts = benchmark.experts_of("olmoe_1b_7b")
    sizes = np.asarray([1] * k + [0] * (experts.num_experts - k), np.int32)
    pieces, tables = benchmark.pieces_gpu(benchmark.products(experts, 8)[name], sizes)
    width = pieces.widths[int(pieces.narrower(tables))]
    busiest = -(-k * -(-pieces.width // width) // NUM_CORES) * width
    assert busiest <= 1.1 * k * pieces.width / NUM_CORES


@pytest.mark.parametrize("name", ("gated", "down", "down_to_rows", "down_to_weights"))
def test_where_nothing_is_kept_nothing_is_read(name):
    experts = benchmark.experts_of("olmoe_1b_7b")
    sizes = np.zeros(experts.num_experts, np.int32)
    product = benchmark.products(experts, 8)[name]
    counted = benchmark.count_gpu(product, sizes)
    assert not any(counted.fetched)
    matrices = np.prod(product.matrices) * len(sizes)
    assert counted.written == (2 * (matrices if product.to_weights else 8 * product.other_rows[1]),)


def test_many_rows_load_each_tile_once_for_all_its_columns():
    experts = benchmark.experts_of("qwen3_30b_a3b")
    sizes = benchmark.draw_sizes(experts, 2048)
    product = benchmark.products(experts, int(sizes.sum()))["down"]
    counted = benchmark.count_gpu(product, sizes)
    tiles = sum(-(-(size + 7) // MANY.rows) for size in sizes)
    assert counted.fetched[1] <= 2 * tiles * np.prod(product.matrices)
    assert counted.written == (2 * product.rows[0] * product.matrices[1],)
