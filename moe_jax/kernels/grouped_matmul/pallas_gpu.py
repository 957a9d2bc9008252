"""Grouped matmul for Hopper GPUs (sm_90a): Pallas kernels on Mosaic GPU, with wgmma and the tensor memory accelerator.

One persistent kernel does all three products. Each streaming multiprocessor takes every `num_cores`-th piece of the
output. One warpgroup loads blocks of both operands into a ring of shared memory and runs ahead into the next piece
while the others, 64 rows of the output each, multiply and store.

A tile of rows starts where its group starts, so it holds rows of one expert only. The last tile of a group with at
least a tile's rows is moved up to end with the group; the rows that two tiles share get the same numbers twice. Of
smaller groups only the rows that exist are loaded and stored. Rows that belong to nobody are tiles without an expert:
nothing is loaded, zeros are stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPGROUP_ROWS = 64  # of the output, per warpgroup: what one wgmma takes
_SWIZZLE_BYTES = 128
_NUM_CORES = 132  # streaming multiprocessors of an H100 or H200, where no device is at hand to ask
_STORE_COLUMNS = 64
_ALIGNMENT = 8  # rows: copies into swizzled shared memory start at a multiple


class Tiles(NamedTuple):
    """How the products are cut."""

    rows: int  # of the output: 64 or 128
    columns: int  # of the output: a multiple of 64, at most 256
    depth: int  # of the sums, per block: a multiple of 64
    stages: int  # blocks of both operands in shared memory


FEW = Tiles(64, 64, 128, 6)
MANY = Tiles(128, 256, 64, 4)


def choose_tiles(num_rows: int, num_experts: int) -> Tiles:
    """The tiles for a number of rows: those that stream weights where few rows share a matrix."""
    return MANY if num_rows > 64 * num_experts else FEW


class _Shape(NamedTuple):
    """What is static in one launch."""

    tiles: Tiles
    num_cores: int
    column_tiles: int
    dtype: jnp.dtype


def _transforms(dtype):
    width = _SWIZZLE_BYTES // dtype.itemsize
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(_SWIZZLE_BYTES)


def _ring(shape: _Shape, piece, load, rows_of, columns_of, store):
    """The kernel: what every streaming multiprocessor does.

    Args:
        shape: what is static.
        piece: from the number of a piece of the output to (its number of blocks in depth, what the others take).
        load: loads block `block` of a piece into a slot and arrives at its barrier.
        rows_of: from a slot to the left operand of one warpgroup.
        columns_of: from a slot to the right operand.
        store: stores a warpgroup's sums.
    """

    def kernel(num_pieces, full, empty):
        stages, consumers = shape.tiles.stages, shape.tiles.rows // _WARPGROUP_ROWS
        warpgroup, core = lax.axis_index("warpgroup"), lax.axis_index("core")
        mine = lax.div(num_pieces - core + (shape.num_cores - 1), jnp.int32(shape.num_cores))

        def slot(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(warpgroup == consumers)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def of_piece(number, step):
                blocks, at = piece(core + number * shape.num_cores)

                def of_block(block, step):
                    @pl.when(step >= stages)
                    def _free():
                        plgpu.barrier_wait(empty.at[slot(step)])

                    load(at, block, slot(step), full.at[slot(step)])
                    return step + 1

                return lax.fori_loop(0, blocks, of_block, step)

            steps = lax.fori_loop(0, mine, of_piece, jnp.int32(0))

            @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[slot(step)])

        @pl.when(warpgroup < consumers)
        def _multiply():
            plgpu.set_max_registers(240 if consumers == 2 else 256 - 24, action="increase")

            def of_piece(number, step):
                blocks, at = piece(core + number * shape.num_cores)

                def accumulate(sums):
                    def of_block(block, step):
                        plgpu.barrier_wait(full.at[slot(step)])
                        plgpu.wgmma(sums, rows_of(slot(step), warpgroup), columns_of(slot(step)))
                        plgpu.wgmma_wait(1)

                        @pl.when(block > 0)
                        def _release():
                            plgpu.barrier_arrive(empty.at[slot(step + (stages - 1))])

                        return step + 1

                    last = lax.fori_loop(0, blocks, of_block, step)
                    plgpu.wgmma_wait(0)

                    @pl.when(blocks > 0)
                    def _release_last():
                        plgpu.barrier_arrive(empty.at[slot(last + (stages - 1))])

                    return sums[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((_WARPGROUP_ROWS, shape.tiles.columns), jnp.float32))
                store(at, warpgroup, sums)
                return step + blocks

            lax.fori_loop(0, mine, of_piece, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return kernel


def _store(shape: _Shape, out_smem, out_gmem, row, begin, end, column, warpgroup, sums):
    """Stores rows `begin` up to `end` of 64 rows of sums, 64 columns at a time: a power of two of rows per copy."""
    count = end - begin
    for number in range(shape.tiles.columns // _STORE_COLUMNS):
        slot = number % 2
        columns = slice(number * _STORE_COLUMNS, (number + 1) * _STORE_COLUMNS)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        out_smem[warpgroup, slot] = sums[:, columns].astype(shape.dtype)
        plgpu.commit_smem()
        for bit in reversed(range(_WARPGROUP_ROWS.bit_length())):
            size = 1 << bit

            @pl.when((count & size) != 0)
            def _copy(size=size, slot=slot, columns=columns):
                done = begin + (count & ~(2 * size - 1))
                plgpu.copy_smem_to_gmem(
                    out_smem.at[warpgroup, slot, pl.ds(done, size)],
                    out_gmem.at[pl.ds(row + done, size), pl.ds(column + columns.start, _STORE_COLUMNS)],
                    commit_group=False,
                )

        plgpu.commit_smem_to_gmem_group()


def _scratch(shape: _Shape, rows_block, columns_block, arrivals):
    tiles, dtype = shape.tiles, shape.dtype
    consumers = tiles.rows // _WARPGROUP_ROWS
    width = _SWIZZLE_BYTES // dtype.itemsize
    return [
        plgpu.SMEM((tiles.stages, *rows_block), dtype, transforms=_transforms(dtype)),
        plgpu.SMEM((tiles.stages, *columns_block), dtype, transforms=_transforms(dtype)),
        plgpu.SMEM(
            (consumers, 2, _WARPGROUP_ROWS, _STORE_COLUMNS),
            dtype,
            transforms=(plgpu.TilingTransform((1, width)), plgpu.SwizzleTransform(_SWIZZLE_BYTES)),
        ),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=tiles.stages),
    ]


def _launch(kernel, shape: _Shape, out_type, scratch, interpret):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(shape.num_cores,),
        grid_names=("core",),
        num_threads=shape.tiles.rows // _WARPGROUP_ROWS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


class _RowTiles(NamedTuple):
    """Tiles of rows: of the groups in order, then of the rows that belong to nobody."""

    count: jax.Array  # int32 [1]: how many there are
    matrix_T: jax.Array  # int32: which matrix of the stack; -1 for nobody's
    block_T: jax.Array  # int32: where the tile starts, in blocks of 8 rows
    begin_T: jax.Array  # int32: its first row that belongs to the group, counted from its start
    end_T: jax.Array  # int32: one past the last


def _row_tiles(group_sizes_E, layer, num_rows: int, size: int) -> _RowTiles:
    """Cuts sorted rows into tiles: two sums over small comparisons, since each kernel launched costs microseconds."""
    num_groups = group_sizes_E.shape[0] + 1
    group_G = jnp.arange(num_groups)
    sizes_E = group_sizes_E.astype(jnp.int32)
    sizes_G = jnp.append(sizes_E, num_rows - sizes_E.sum(dtype=jnp.int32))
    last_G = jnp.where(group_G[:, None] >= group_G[None], sizes_G[None], 0).sum(1, dtype=jnp.int32)
    first_G = last_G - sizes_G
    base_G = first_G // _ALIGNMENT * _ALIGNMENT
    tiles_G = jnp.where(sizes_G > 0, (last_G - base_G + (size - 1)) // size, 0)
    last_tile_G = jnp.where(group_G[:, None] >= group_G[None], tiles_G[None], 0).sum(1, dtype=jnp.int32)
    bound = min(num_groups, num_rows)
    number_T = jnp.arange((num_rows + bound * (_ALIGNMENT - 1)) // size + bound, dtype=jnp.int32)
    group_T = (last_tile_G[None] <= number_T[:, None]).sum(1, dtype=jnp.int32)
    is_TG = group_T[:, None] == group_G[None]
    first_T, last_T, first_tile_T = (
        jnp.where(is_TG, of_G[None], 0).sum(1, dtype=jnp.int32) for of_G in (first_G, last_G, last_tile_G - tiles_G)
    )
    start_T = first_T // _ALIGNMENT * _ALIGNMENT + (number_T - first_tile_T) * size
    matrix_T = jnp.where(group_T < num_groups - 1, layer * (num_groups - 1) + group_T, -1)
    begin_T = jnp.maximum(first_T - start_T, 0)
    return _RowTiles(last_tile_G[-1:], matrix_T, start_T // _ALIGNMENT, begin_T, jnp.minimum(last_T - start_T, size))


def _chunks(size: int) -> list[tuple[int, int]]:
    """(first row, rows) of the copies that load a tile's rows: those without a row are left out."""
    if size > _WARPGROUP_ROWS:
        return [(0, size)]
    return [(0, 8), (8, 8), (16, 16), (32, 32)]


def _multiply(rows_SX, weights_LEFD, group_sizes_E, layer, *, transposed, tiles, num_cores, interpret):
    """Rows by matrices [F, D] along D, or by their transposes along F: out is [S, F] or [S, D]."""
    weights_MFD = weights_LEFD.reshape(-1, *weights_LEFD.shape[2:])
    asked, depth = rows_SX.shape
    width = weights_MFD.shape[2 if transposed else 1]
    tiles = tiles or choose_tiles(asked, group_sizes_E.shape[0])
    if asked % _ALIGNMENT:
        rows_SX = jnp.pad(rows_SX, ((0, -asked % _ALIGNMENT), (0, 0)))
    num_rows = rows_SX.shape[0]
    shape = _Shape(tiles, num_cores, pl.cdiv(width, tiles.columns), rows_SX.dtype)
    chunks = _chunks(tiles.rows)
    columns_block = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)

    def kernel(count, matrix_T, block_T, begin_T, end_T, rows_gmem, weights_gmem, out_gmem, *scratch):
        rows_smem, columns_smem, out_smem, full, empty = scratch

        def piece(number):
            tile = lax.div(number, jnp.int32(shape.column_tiles))
            column = lax.rem(number, jnp.int32(shape.column_tiles)) * tiles.columns
            matrix = matrix_T[tile]
            blocks = lax.select(matrix < 0, jnp.int32(0), jnp.int32(pl.cdiv(depth, tiles.depth)))
            return blocks, (matrix, block_T[tile] * _ALIGNMENT, begin_T[tile], end_T[tile], column)

        def load(at, block, slot, barrier):
            matrix, start, _, end, column = at
            deep = pl.ds(block * tiles.depth, tiles.depth)
            wide = pl.ds(column, tiles.columns)
            for begin, size in chunks:

                def copy(begin=begin, size=size):
                    plgpu.copy_gmem_to_smem(
                        rows_gmem.at[pl.ds(start + begin, size), deep],
                        rows_smem.at[slot, pl.ds(begin, size)],
                        barrier,
                    )

                if begin == 0:
                    copy()
                else:
                    lax.cond(end > begin, copy, lambda: plgpu.barrier_arrive(barrier))
            plgpu.copy_gmem_to_smem(
                weights_gmem.at[matrix, deep, wide] if transposed else weights_gmem.at[matrix, wide, deep],
                columns_smem.at[slot],
                barrier,
            )

        def rows_of(slot, warpgroup):
            return rows_smem.at[slot, pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]

        def columns_of(slot):
            block = columns_smem.at[slot]
            return block if transposed else block.transpose((1, 0))

        def store(at, warpgroup, sums):
            _, start, begin, end, column = at
            row = warpgroup * _WARPGROUP_ROWS
            begin, end = (lax.clamp(jnp.int32(0), x - row, jnp.int32(_WARPGROUP_ROWS)) for x in (begin, end))
            _store(shape, out_smem, out_gmem, start + row, begin, end, column, warpgroup, sums)

        _ring(shape, piece, load, rows_of, columns_of, store)(count[0] * shape.column_tiles, full, empty)

    scratch = _scratch(shape, (tiles.rows, tiles.depth), columns_block, len(chunks) + 1)
    out = jax.ShapeDtypeStruct((num_rows, width), rows_SX.dtype)
    out_SY = _launch(kernel, shape, out, scratch, interpret)(
        *_row_tiles(group_sizes_E, layer, num_rows, tiles.rows), rows_SX, weights_MFD
    )
    return out_SY[:asked]


def forward(rows_SD, weights_LEFD, group_sizes_E, layer, *, tiles=None, num_cores=_NUM_CORES, interpret=None):
    """As `api.grouped_matmul`."""
    return _multiply(
        rows_SD,
        weights_LEFD,
        group_sizes_E,
        layer,
        transposed=False,
        tiles=tiles,
        num_cores=num_cores,
        interpret=interpret,
    )
