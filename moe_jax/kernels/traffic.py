"""Counts the bytes that a Pallas kernel moves between device memory and the chip, from what the kernel itself reads.

On a TPU (`count`) that is its grid: it is walked in order, and the index maps of the blocks are evaluated, those that
Pallas' pipeline gets. A block of an operand is fetched when its index differs from that of the step before; a block of
an output is written when the index changes, and at the end. Where two cores share a grid, each takes half of its first
axis and fetches the blocks of its own steps.

On a GPU (`count_pieces`) it is the description of pieces that the kernel copies by. Every copy is counted, also where
the cache holds what it reads.

What lies outside an array is not counted.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Traffic(NamedTuple):
    """The bytes that one launch moves."""

    fetched: tuple[int, ...]  # of each operand
    written: tuple[int, ...]  # of each output

    @property
    def total(self) -> int:
        """Of all operands and outputs."""
        return sum(self.fetched) + sum(self.written)


def count(
    grid_spec: Any, scalars: Sequence[Any], operands: Sequence[Any], outputs: Sequence[Any], num_cores: int = 1
) -> Traffic:
    """Counts the traffic of one launch.

    Args:
        grid_spec: what `pallas_call` is given; blocks are pipelined by Pallas.
        scalars: prefetched arguments, with values; each may be a nest of arrays.
        operands: the other arguments, of which only shape and dtype are read.
        outputs: shape and dtype of each output.
        num_cores: that share the grid.
    """
    grid = tuple(int(size) for size in grid_spec.grid)
    steps = np.array_split(np.indices(grid, dtype=np.int32), num_cores, axis=1)
    cores = [steps_of_core.reshape(len(grid), -1) for steps_of_core in steps]
    scalars = jax.tree.map(np.asarray, tuple(scalars))
    in_specs = jax.tree.leaves(grid_spec.in_specs)
    out_specs = jax.tree.leaves(grid_spec.out_specs)
    if len(in_specs) != len(operands) or len(out_specs) != len(outputs):
        raise ValueError(
            f"expected {len(in_specs)} operands and {len(out_specs)} outputs, got {len(operands)}, {len(outputs)}"
        )
    return Traffic(
        tuple(_moved(spec, array, cores, scalars) for spec, array in zip(in_specs, operands)),
        tuple(_moved(spec, array, cores, scalars) for spec, array in zip(out_specs, outputs)),
    )


def _moved(spec, array, cores, scalars) -> int:
    """Bytes of the blocks that differ from those of the step before: all that a core fetches, or writes."""
    return sum(_moved_by_core(spec, array, steps, scalars) for steps in cores)


def _moved_by_core(spec, array, steps, scalars) -> int:
    num_steps = steps.shape[1]
    if num_steps == 0:
        return 0
    index = [np.broadcast_to(axis, num_steps) for axis in spec.index_map(*steps, *scalars)]
    new = np.ones(num_steps, bool)
    new[1:] = np.any([axis[1:] != axis[:-1] for axis in index], axis=0)
    numbers = np.ones(int(new.sum()), np.int64)
    for axis, block, size in zip(index, spec.block_shape, array.shape, strict=True):
        block = 1 if block is None else block
        numbers *= np.clip(size - axis[new].astype(np.int64) * block, 0, block)
    return int(numbers.sum()) * np.dtype(array.dtype).itemsize


def count_pieces(description: Any, tables: Sequence[jax.Array], operands: Sequence[Any], output: Any) -> Traffic:
    """Counts the copies of a kernel that is described by pieces, as `grouped_matmul/pallas_gpu_pieces.py` does.

    Args:
        description: hashable: a function `piece`, and of each piece its loads and stores.
        tables: what `piece` takes beside a number, with values.
        operands: by their number, of which only shape and dtype are read.
        output: shape and dtype.
    """
    most = int(_most_blocks(description, tables))
    shapes = tuple(tuple(array.shape[-2:]) for array in (*operands, output))
    moved = [
        np.asarray(moved_by_piece, np.int64).sum(0) for moved_by_piece in _copied(description, tables, shapes, most)
    ]
    *fetched, written = (
        int(numbers) * np.dtype(array.dtype).itemsize
        for numbers, array in zip(np.append(*moved), (*operands, output), strict=True)
    )
    return Traffic(tuple(fetched), (written,))


@functools.partial(jax.jit, static_argnums=0)
def _most_blocks(description, tables):
    return jax.vmap(lambda number: description.piece(number, tables).blocks)(_numbers(description)).max()


def _numbers(description):
    return jnp.arange(description.most_pieces, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _copied(description, tables, shapes, most):
    """Numbers that each piece loads of each operand, and those that it stores."""
    *operand_shapes, output_shape = shapes

    def inside(start, size, limit):
        return jnp.clip(limit - jnp.asarray(start, jnp.int32), 0, size)

    def loaded(blocks):
        moved = [jnp.int32(0)] * len(operand_shapes)
        for block in blocks:
            rows, columns = map(inside, block.start, block.size, operand_shapes[block.operand])
            moved[block.operand] += rows * columns
        return jnp.stack(moved)

    def move_piece(number):
        piece, exists = description.piece(number, tables), number < description.count(tables)

        def load_block(block):
            chosen = (
                jnp.stack([loaded(blocks) for blocks in alternatives])[taken]
                for taken, alternatives in description.loads(piece, block)
            )
            return jnp.where(exists & (block < piece.blocks), sum(chosen), 0)

        stored = jnp.int32(0)
        for warpgroup in range(description.warpgroups):
            store = description.store(piece, jnp.int32(warpgroup))
            columns = inside(store.column, store.width, output_shape[1])
            for made, first, rows in store.copies():
                stored += jnp.where(exists & made, inside(store.row + first, rows, output_shape[0]) * columns, 0)
        return jax.vmap(load_block)(jnp.arange(most, dtype=jnp.int32)).sum(0, dtype=jnp.int32), stored

    return jax.vmap(move_piece)(_numbers(description))


def least(kept_experts: int, matrix: int, rows: Sequence[tuple[int, int]], itemsize: int) -> int:
    """The least bytes of a grouped product: each kept expert's matrix once, and each array of rows once.

    Args:
        kept_experts: experts that have rows.
        matrix: numbers of one expert's matrices.
        rows: shapes of the arrays of rows, read or written.
        itemsize: bytes of a number.
    """
    return itemsize * (kept_experts * matrix + sum(map(math.prod, rows)))
