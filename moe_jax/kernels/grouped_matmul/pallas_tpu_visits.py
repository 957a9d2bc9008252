"""Which rows `pallas_tpu` multiplies by which expert, in which order: tables, made before the kernel.

Rows are cut into blocks of equal size. A visit is one block with one of the experts whose rows it holds; visits are
sorted by block and by expert, so each block of rows, each block of the output and each matrix is needed in one run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """The visits in the first `count` entries; in each array, one int32 per visit."""

    count: jax.Array  # int32 scalar
    expert_T: jax.Array  # whose matrix; where a block has no rows of any expert, that of the visit before
    block_T: jax.Array  # rows to read; where there are none, those of the visit before
    out_block_T: jax.Array  # rows to write
    begin_T: jax.Array  # the expert's first row in the block, counted from the start of the block
    end_T: jax.Array  # one past its last row


def _runs(visits_E, most: int):
    """(expert_T, number_T): who makes each visit, and its number among the expert's own; the last expert repeats."""
    last_E = jnp.cumsum(visits_E, dtype=jnp.int32)
    visit_T = jnp.arange(most, dtype=jnp.int32)
    busiest = jnp.max(jnp.where(visits_E > 0, jnp.arange(visits_E.shape[0]), 0))
    expert_T = jnp.minimum((last_E[None] <= visit_T[:, None]).sum(1), busiest).astype(jnp.int32)
    return expert_T, visit_T - (last_E - visits_E)[expert_T]


def for_rows(group_sizes_E: jax.Array, num_rows: int, size: int) -> Visits:
    """The visits of a product: of each expert that has rows, then of blocks that hold no rows of any expert.

    Args:
        group_sizes_E: int32, rows of each expert; rows lie in the order of the experts.
        num_rows: S.
        size: rows per block.
    """
    blocks = -(-num_rows // size)
    most = blocks + min(group_sizes_E.shape[0], num_rows)
    last_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    first_E = last_E - group_sizes_E
    visits_E = jnp.where(group_sizes_E > 0, (last_E - 1) // size - first_E // size + 1, 0)
    expert_T, number_T = _runs(visits_E, most)
    held_visits, held_blocks = visits_E.sum(dtype=jnp.int32), (last_E[-1] + size - 1) // size
    visit_T = jnp.arange(most, dtype=jnp.int32)
    held_T = visit_T < held_visits
    own_T = first_E[expert_T] // size + number_T
    out_block_T = jnp.minimum(jnp.where(held_T, own_T, held_blocks + visit_T - held_visits), blocks - 1)
    block_T = jnp.minimum(out_block_T, jnp.maximum(held_blocks - 1, 0))
    start_T = out_block_T * size
    begin_T = jnp.where(held_T, jnp.maximum(first_E[expert_T] - start_T, 0), 0)
    end_T = jnp.where(held_T, jnp.minimum(last_E[expert_T] - start_T, size), 0)
    return Visits(held_visits + blocks - held_blocks, expert_T, block_T, out_block_T, begin_T, end_T)


def for_experts(group_sizes_E: jax.Array, num_rows: int, size: int) -> Visits:
    """The visits of a gradient to weights: as `for_rows`, but every expert has one, and no other block is visited."""
    blocks = -(-num_rows // size)
    most = blocks + group_sizes_E.shape[0]
    last_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    first_E = last_E - group_sizes_E
    # an expert without rows stays at the block of the row before its place
    first_block_E = jnp.where(group_sizes_E > 0, first_E, jnp.maximum(first_E - 1, 0)) // size
    visits_E = jnp.maximum(last_E - 1, 0) // size - first_block_E + 1
    expert_T, number_T = _runs(visits_E, most)
    block_T = jnp.minimum(first_block_E[expert_T] + number_T, blocks - 1)
    start_T = block_T * size
    begin_T = jnp.maximum(first_E[expert_T] - start_T, 0)
    end_T = jnp.minimum(last_E[expert_T] - start_T, size)
    return Visits(visits_E.sum(dtype=jnp.int32), expert_T, block_T, block_T, begin_T, end_T)
