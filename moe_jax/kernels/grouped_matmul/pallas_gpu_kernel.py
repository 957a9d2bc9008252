"""The kernels of `pallas_gpu`: one ring of blocks in shared memory, and the three products that go through it.

Each streaming multiprocessor takes every `num_cores`-th piece of the output. One warpgroup loads blocks of both
operands into the ring and runs ahead into the next piece, while the others, 64 rows of the output each, multiply and
store.

A tile of rows holds rows of one expert. Copies into swizzled shared memory start at a multiple of 8 rows, so the first
tile of a group starts up to 7 rows before it; only the group's own rows are stored. Of tiles with few rows not many
more are loaded than there are. Rows that belong to nobody are tiles without a matrix: nothing is loaded, zeros are
stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.grouped_matmul.pallas_gpu import Tiles
from moe_jax.kernels.grouped_matmul.pallas_gpu_rows import ALIGNMENT, most_tiles, row_tiles, tile_at

_WARPGROUP_ROWS = 64  # of the output, per warpgroup: what one wgmma takes
_SWIZZLE_BYTES = 128
_STORE_COLUMNS = 64


class _Shape(NamedTuple):
    """What is static in one launch."""

    tiles: Tiles
    num_cores: int
    column_tiles: int
    dtype: jnp.dtype


def _transforms(dtype):
    width = _SWIZZLE_BYTES // dtype.itemsize
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(_SWIZZLE_BYTES)


def _ring(shape: _Shape, piece, load_block, rows_of, columns_of, store):
    """The kernel: what every streaming multiprocessor does.

    Args:
        shape: what is static.
        piece: from the number of a piece of the output to (its number of blocks in depth, what the others take).
        load_block: copies block `block` of a piece into a slot and arrives at its barrier.
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

            def load_piece(number, step):
                blocks, at = piece(core + number * shape.num_cores)

                def load_next(block, step):
                    @pl.when(step >= stages)
                    def _free():
                        plgpu.barrier_wait(empty.at[slot(step)])

                    load_block(at, block, slot(step), full.at[slot(step)])
                    return step + 1

                return lax.fori_loop(0, blocks, load_next, step)

            steps = lax.fori_loop(0, mine, load_piece, jnp.int32(0))

            @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[slot(step)])

        @pl.when(warpgroup < consumers)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            def multiply_piece(number, step):
                blocks, at = piece(core + number * shape.num_cores)

                def accumulate(sums):
                    def multiply_next(block, step):
                        plgpu.barrier_wait(full.at[slot(step)])
                        plgpu.wgmma(sums, rows_of(slot(step), warpgroup), columns_of(slot(step)))
                        plgpu.wgmma_wait(1)

                        @pl.when(block > 0)
                        def _release():
                            plgpu.barrier_arrive(empty.at[slot(step + (stages - 1))])

                        return step + 1

                    last = lax.fori_loop(0, blocks, multiply_next, step)
                    plgpu.wgmma_wait(0)

                    @pl.when(blocks > 0)
                    def _release_last():
                        plgpu.barrier_arrive(empty.at[slot(last + (stages - 1))])

                    return sums[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((_WARPGROUP_ROWS, shape.tiles.columns), jnp.float32))
                store(at, warpgroup, sums)
                return step + blocks

            lax.fori_loop(0, mine, multiply_piece, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return kernel


def _store(shape: _Shape, out_smem, out_gmem, row, begin, end, column, warpgroup, sums):
    """Stores rows `begin` up to `end` of 64 rows of sums, 64 columns at a time: a power of two of rows per copy."""
    count = end - begin  # static where all rows are stored
    for number in range(sums.shape[1] // _STORE_COLUMNS):
        slot = number % 2
        columns = slice(number * _STORE_COLUMNS, (number + 1) * _STORE_COLUMNS)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        out_smem[warpgroup, slot] = sums[:, columns].astype(shape.dtype)
        plgpu.commit_smem()
        for bit in reversed(range(_WARPGROUP_ROWS.bit_length())):
            size = 1 << bit
            if isinstance(count, int) and not count & size:
                continue

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


def _launch(kernel, shape: _Shape, out_type, scratch):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(shape.num_cores,),
        grid_names=("core",),
        num_threads=shape.tiles.rows // _WARPGROUP_ROWS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _load_sizes(size: int) -> list[int]:
    """How many rows of a tile one copy may load: the least that holds all its rows is taken."""
    return [size] if size > _WARPGROUP_ROWS else [8, 16, 32, 64]


def multiply(rows_SX, weights_LEFD, group_sizes_E, layer, *, tiles, num_cores, transposed=False, gated=False):
    """Rows by matrices [F, D] along D, or by their transposes along F: out is [S, F] or [S, D].

    Where it is gated, there are two matrices for each expert, weights_LEIFD, and out is silu(first) * second.
    """
    weights_MFD = weights_LEFD.reshape(-1, *weights_LEFD.shape[-2:])
    asked, depth = rows_SX.shape
    width = weights_MFD.shape[2 if transposed else 1]
    if asked % ALIGNMENT:
        rows_SX = jnp.pad(rows_SX, ((0, -asked % ALIGNMENT), (0, 0)))
    num_rows = rows_SX.shape[0]
    out_columns = tiles.columns // 2 if gated else tiles.columns
    shape = _Shape(tiles, num_cores, pl.cdiv(width, out_columns), rows_SX.dtype)
    sizes = _load_sizes(tiles.rows)
    columns_block = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)

    num_experts = group_sizes_E.shape[0]
    num_tiles = most_tiles(num_experts, num_rows, tiles.rows)
    cut = row_tiles(group_sizes_E, num_rows, tiles.rows)

    def kernel(layer, group_T, first_tile_T, first_T, size_T, rows_gmem, weights_gmem, out_gmem, *scratch):
        rows_smem, columns_smem, out_smem, full, empty = scratch

        def piece(number):
            tile = lax.div(number, jnp.int32(shape.column_tiles))
            column = lax.rem(number, jnp.int32(shape.column_tiles)) * out_columns
            entry = group_T[tile], first_tile_T[tile], first_T[tile], size_T[tile]
            group, start, begin, end = tile_at(entry, tile, num_experts, num_rows, tiles.rows)
            blocks = lax.select(
                (group < num_experts) & (end > begin), jnp.int32(pl.cdiv(depth, tiles.depth)), jnp.int32(0)
            )
            return blocks, (layer[0] * num_experts + group, start, begin, end, column)

        def load_block(at, block, slot, barrier):
            matrix, start, _, end, column = at
            deep = pl.ds(block * tiles.depth, tiles.depth)
            wide = pl.ds(column, out_columns)

            def copy_rows(size):
                source, target = rows_gmem.at[pl.ds(start, size), deep], rows_smem.at[slot, pl.ds(0, size)]
                plgpu.copy_gmem_to_smem(source, target, barrier)

            choice = sum(((end > size).astype(jnp.int32) for size in sizes[:-1]), jnp.int32(0))
            lax.switch(choice, [functools.partial(copy_rows, size) for size in sizes])
            if gated:
                for half in range(2):
                    source = weights_gmem.at[2 * matrix + half, wide, deep]
                    target = columns_smem.at[slot, pl.ds(half * out_columns, out_columns)]
                    plgpu.copy_gmem_to_smem(source, target, barrier)
                return
            source = weights_gmem.at[matrix, deep, wide] if transposed else weights_gmem.at[matrix, wide, deep]
            plgpu.copy_gmem_to_smem(source, columns_smem.at[slot], barrier)

        def rows_of(slot, warpgroup):
            return rows_smem.at[slot, pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]

        def columns_of(slot):
            block = columns_smem.at[slot]
            return block if transposed else block.transpose((1, 0))

        def store(at, warpgroup, sums):
            _, start, begin, end, column = at
            if gated:
                gate, up = sums[:, :out_columns], sums[:, out_columns:]
                sums = gate / (1 + jnp.exp(-gate)) * up
            row = warpgroup * _WARPGROUP_ROWS
            begin, end = (lax.clamp(jnp.int32(0), x - row, jnp.int32(_WARPGROUP_ROWS)) for x in (begin, end))

            @pl.when(end > begin)
            def _store_rows():
                _store(shape, out_smem, out_gmem, start + row, begin, end, column, warpgroup, sums)

        _ring(shape, piece, load_block, rows_of, columns_of, store)(
            jnp.int32(num_tiles * shape.column_tiles), full, empty
        )

    scratch = _scratch(shape, (tiles.rows, tiles.depth), columns_block, 3 if gated else 2)
    out = jax.ShapeDtypeStruct((num_rows, width), rows_SX.dtype)
    out_SY = _launch(kernel, shape, out, scratch)(jnp.asarray(layer, jnp.int32)[None], *cut, rows_SX, weights_MFD)
    return out_SY[:asked]


def _edges(rows_SX, first_E, last_E, depth: int):
    """The first and last blocks of groups, which are cut into blocks of `depth` rows from a multiple of 8 on.

    Rows of others are zero.

    Returns:
        [E * 2 * depth, X].
    """
    base_E = first_E // ALIGNMENT * ALIGNMENT
    final_E = base_E + (last_E - 1 - base_E) // depth * depth
    row_EBR = jnp.stack([base_E, final_E], axis=1)[..., None] + jnp.arange(depth, dtype=jnp.int32)[None, None]
    own_EBR = (row_EBR >= first_E[:, None, None]) & (row_EBR < last_E[:, None, None])
    edges_EBRX = jnp.where(own_EBR[..., None], rows_SX.at[row_EBR].get(mode="clip"), 0)
    return edges_EBRX.reshape(-1, rows_SX.shape[1])


def weights_gradient(rows_SD, group_sizes_E, out_grad_SF, *, tiles, num_cores):
    """[E, F, D]: of each expert, the gradient of its outputs transposed times its rows; blocks of rows are the depth.

    Blocks at the edges of a group hold rows of others as well. They come from a copy in which those are zero.
    """
    num_experts = group_sizes_E.shape[0]
    if rows_SD.shape[0] % ALIGNMENT:
        fill = ((0, -rows_SD.shape[0] % ALIGNMENT), (0, 0))
        rows_SD, out_grad_SF = jnp.pad(rows_SD, fill), jnp.pad(out_grad_SF, fill)
    d_model, d_out = rows_SD.shape[1], out_grad_SF.shape[1]
    shape = _Shape(tiles, num_cores, pl.cdiv(d_model, tiles.columns), rows_SD.dtype)
    down_tiles = pl.cdiv(d_out, tiles.rows)
    last_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    first_E = last_E - group_sizes_E
    edges = [_edges(x, first_E, last_E, tiles.depth) for x in (out_grad_SF, rows_SD)]

    def kernel(first_E, last_E, grad_gmem, rows_gmem, grad_edges_gmem, rows_edges_gmem, out_gmem, *scratch):
        grad_smem, rows_smem, out_smem, full, empty = scratch

        def piece(number):
            column = lax.rem(number, jnp.int32(shape.column_tiles)) * tiles.columns
            number = lax.div(number, jnp.int32(shape.column_tiles))
            expert, row = lax.div(number, jnp.int32(down_tiles)), lax.rem(number, jnp.int32(down_tiles)) * tiles.rows
            first, last = first_E[expert], last_E[expert]
            base = lax.div(first, jnp.int32(ALIGNMENT)) * ALIGNMENT
            blocks = lax.div(last - base + (tiles.depth - 1), jnp.int32(tiles.depth))
            blocks = lax.select(last > first, blocks, jnp.int32(0))
            return blocks, (expert, row, column, base, blocks)

        def load_block(at, block, slot, barrier):
            expert, row, column, base, blocks = at

            def copy(grad_gmem, rows_gmem, start):
                deep = pl.ds(start, tiles.depth)
                plgpu.copy_gmem_to_smem(grad_gmem.at[deep, pl.ds(row, tiles.rows)], grad_smem.at[slot], barrier)
                plgpu.copy_gmem_to_smem(rows_gmem.at[deep, pl.ds(column, tiles.columns)], rows_smem.at[slot], barrier)

            edge = (expert * 2 + lax.min(block, jnp.int32(1))) * tiles.depth
            lax.cond(
                (block == 0) | (block == blocks - 1),
                lambda: copy(grad_edges_gmem, rows_edges_gmem, edge),
                lambda: copy(grad_gmem, rows_gmem, base + block * tiles.depth),
            )

        def rows_of(slot, warpgroup):
            own = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
            return grad_smem.at[slot, :, own].transpose((1, 0))

        def columns_of(slot):
            return rows_smem.at[slot]

        def store(at, warpgroup, sums):
            expert, row, column, _, _ = at
            row = row + warpgroup * _WARPGROUP_ROWS
            _store(shape, out_smem, out_gmem.at[expert], row, 0, _WARPGROUP_ROWS, column, warpgroup, sums)

        num_pieces = jnp.int32(num_experts * down_tiles * shape.column_tiles)
        _ring(shape, piece, load_block, rows_of, columns_of, store)(num_pieces, full, empty)

    scratch = _scratch(shape, (tiles.depth, tiles.rows), (tiles.depth, tiles.columns), 2)
    out = jax.ShapeDtypeStruct((num_experts, d_out, d_model), rows_SD.dtype)
    return _launch(kernel, shape, out, scratch)(first_E, last_E, out_grad_SF, rows_SD, *edges)
