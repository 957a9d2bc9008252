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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.grouped_matmul.pallas_gpu_pieces import (
    WARPGROUP_ROWS,
    GradientPieces,
    ProductPieces,
)
from moe_jax.kernels.grouped_matmul.pallas_gpu_rows import ALIGNMENT

_SWIZZLE_BYTES = 128


def _transforms(dtype):
    width = _SWIZZLE_BYTES // dtype.itemsize
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(_SWIZZLE_BYTES)


def _load(operands, rings, blocks, slot, barrier):
    """Copies blocks into a slot of the rings; each arrives at the barrier."""
    for block in blocks:
        area = tuple(pl.ds(start, size) for start, size in zip(block.start, block.size))
        source = operands[block.operand].at[area if block.matrix is None else (block.matrix, *area)]
        plgpu.copy_gmem_to_smem(source, rings[block.ring].at[slot, pl.ds(block.place, block.size[0])], barrier)


def _multiply_pieces(description, num_cores: int, tables, operands, rings, full, empty, left, right, finish):
    """What every streaming multiprocessor does.

    Args:
        description: of the pieces, from `pallas_gpu_pieces`.
        num_cores: streaming multiprocessors.
        tables: what the description takes.
        operands: in device memory.
        rings: of blocks of the left and of the right operand, in shared memory.
        full: a barrier for each slot, at which loads arrive.
        empty: another, at which those arrive that have read it.
        left: from a slot and a warpgroup to the left operand of wgmma.
        right: from a slot to the right operand.
        finish: takes a piece, the number of a warpgroup and its sums, and stores what is made of them.
    """
    stages, consumers = description.tiles.stages, description.warpgroups
    warpgroup, core = lax.axis_index("warpgroup"), lax.axis_index("core")
    mine = lax.div(description.count(tables) - core + (num_cores - 1), jnp.int32(num_cores))

    def slot(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(warpgroup == consumers)
    def _load_all():
        plgpu.set_max_registers(40, action="decrease")

        def load_piece(number, step):
            piece = description.piece(core + number * num_cores, tables)

            def load_next(block, step):
                @pl.when(step >= stages)
                def _free():
                    plgpu.barrier_wait(empty.at[slot(step)])

                for taken, alternatives in description.loads(piece, block):
                    copies = [
                        functools.partial(_load, operands, rings, blocks, slot(step), full.at[slot(step)])
                        for blocks in alternatives
                    ]
                    if len(copies) == 1:
                        copies[0]()
                    else:
                        lax.switch(taken, copies)
                return step + 1

            return lax.fori_loop(0, piece.blocks, load_next, step)

        steps = lax.fori_loop(0, mine, load_piece, jnp.int32(0))

        @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
        def _drain(step):
            plgpu.barrier_wait(empty.at[slot(step)])

    @pl.when(warpgroup < consumers)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")

        def multiply_piece(number, step):
            piece = description.piece(core + number * num_cores, tables)

            def accumulate(sums):
                def multiply_next(block, step):
                    plgpu.barrier_wait(full.at[slot(step)])
                    plgpu.wgmma(sums, left(slot(step), warpgroup), right(slot(step)))
                    plgpu.wgmma_wait(1)

                    @pl.when(block > 0)
                    def _release():
                        plgpu.barrier_arrive(empty.at[slot(step + (stages - 1))])

                    return step + 1

                last = lax.fori_loop(0, piece.blocks, multiply_next, step)
                plgpu.wgmma_wait(0)

                @pl.when(piece.blocks > 0)
                def _release_last():
                    plgpu.barrier_arrive(empty.at[slot(last + (stages - 1))])

                return sums[...]

            sums = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, description.tiles.columns), jnp.float32))
            finish(piece, warpgroup, sums)
            return step + piece.blocks

        lax.fori_loop(0, mine, multiply_piece, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _store(store, out_smem, out_gmem, warpgroup, sums):
    """Stores rows of a warpgroup's sums, some columns at a time."""
    out_gmem = out_gmem if store.matrix is None else out_gmem.at[store.matrix]
    columns = out_smem.shape[-1]
    for number, start in enumerate(range(0, sums.shape[1], columns)):
        slot = number % 2

        @pl.when(start < store.width)
        def _store_columns(number=number, start=start, slot=slot):
            # the last copy of the piece before may still read the first slot
            plgpu.wait_smem_to_gmem(1 if number else 0, wait_read_only=True)
            out_smem[warpgroup, slot] = sums[:, start : start + columns].astype(out_smem.dtype)
            plgpu.commit_smem()
            for made, first, size in store.copies():

                @pl.when(made)
                def _copy(first=first, size=size):
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup, slot, pl.ds(first, size)],
                        out_gmem.at[pl.ds(store.row + first, size), pl.ds(store.column + start, columns)],
                        commit_group=False,
                    )

            plgpu.commit_smem_to_gmem_group()


def _scratch(description, dtype, left_block, right_block, arrivals: int):
    tiles, columns = description.tiles, description.store_columns
    consumers = tiles.rows // WARPGROUP_ROWS
    return [
        plgpu.SMEM((tiles.stages, *left_block), dtype, transforms=_transforms(dtype)),
        plgpu.SMEM((tiles.stages, *right_block), dtype, transforms=_transforms(dtype)),
        plgpu.SMEM(
            (consumers, 2, WARPGROUP_ROWS, columns),
            dtype,
            transforms=(plgpu.TilingTransform((1, columns)), plgpu.SwizzleTransform(columns * dtype.itemsize)),
        ),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=tiles.stages),
    ]


def _launch(kernel, tiles, num_cores: int, out_type, scratch):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(num_cores,),
        grid_names=("core",),
        num_threads=tiles.rows // WARPGROUP_ROWS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _aligned(rows_SX):
    """Rows of zeros after the others, up to a multiple of `ALIGNMENT`."""
    missing = -rows_SX.shape[0] % ALIGNMENT
    return jnp.pad(rows_SX, ((0, missing), (0, 0))) if missing else rows_SX


def multiply(rows_SX, weights_LEFD, group_sizes_E, layer, *, tiles, num_cores, transposed=False, gated=False):
    """Rows by matrices [F, D] along D, or by their transposes along F: out is [S, F] or [S, D].

    Where it is gated, there are two matrices for each expert, weights_LEIFD, and out is silu(first) * second.
    """
    product = ProductPieces.of(rows_SX, weights_LEFD, tiles, num_cores, transposed, gated)
    wide = product.out_columns

    def kernel(*refs):
        *tables, rows_gmem, weights_gmem, out_gmem, rows_smem, columns_smem, out_smem, full, empty = refs

        def left(slot, warpgroup):
            return rows_smem.at[slot, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]

        def right(slot):
            block = columns_smem.at[slot]
            return block if transposed else block.transpose((1, 0))

        def finish(piece, warpgroup, sums):
            if gated:
                gate, up = sums[:, :wide], sums[:, wide:]
                sums = gate / (1 + jnp.exp(-gate)) * up
            store = product.store(piece, warpgroup)

            @pl.when(store.end > store.begin)
            def _store_rows():
                _store(store, out_smem, out_gmem, warpgroup, sums)

        operands, rings = (rows_gmem, weights_gmem), (rows_smem, columns_smem)
        _multiply_pieces(product, num_cores, tables, operands, rings, full, empty, left, right, finish)

    columns_block = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)
    scratch = _scratch(product, rows_SX.dtype, (tiles.rows, tiles.depth), columns_block, 3 if gated else 2)
    out = jax.ShapeDtypeStruct((product.num_rows, product.width), rows_SX.dtype)
    matrices = weights_LEFD.reshape(-1, *weights_LEFD.shape[-2:])
    tables = product.tables(group_sizes_E, layer)
    out_SY = _launch(kernel, tiles, num_cores, out, scratch)(*tables, _aligned(rows_SX), matrices)
    return out_SY[: rows_SX.shape[0]]


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
    gradient = GradientPieces.of(rows_SD, out_grad_SF, group_sizes_E.shape[0], tiles)
    operands = _aligned(out_grad_SF), _aligned(rows_SD)
    tables = gradient.tables(group_sizes_E)
    edges = [_edges(x, *tables, tiles.depth) for x in operands]

    def kernel(first_E, last_E, *refs):
        *operands, out_gmem, grad_smem, rows_smem, out_smem, full, empty = refs

        def left(slot, warpgroup):
            own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            return grad_smem.at[slot, :, own].transpose((1, 0))

        def right(slot):
            return rows_smem.at[slot]

        def finish(piece, warpgroup, sums):
            _store(gradient.store(piece, warpgroup), out_smem, out_gmem, warpgroup, sums)

        tables, rings = (first_E, last_E), (grad_smem, rows_smem)
        _multiply_pieces(gradient, num_cores, tables, operands, rings, full, empty, left, right, finish)

    scratch = _scratch(gradient, rows_SD.dtype, (tiles.depth, tiles.rows), (tiles.depth, tiles.columns), 2)
    out = jax.ShapeDtypeStruct((gradient.num_experts, gradient.d_out, gradient.d_model), rows_SD.dtype)
    return _launch(kernel, tiles, num_cores, out, scratch)(*tables, *operands, *edges)
