"""How the rows of sorted groups are cut into row blocks, each of one expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALLEST_BLOCK, LARGEST_BLOCK = 1, 256


class Blocks(NamedTuple):
    """A table of row blocks; only the first `count` entries hold one, so a loop over them does no work for the rest.

    A block is `size` rows long in memory. Rows outside `[first, last)` belong to a neighbour or to nobody.
    """

    count: jax.Array  # int32 scalar
    expert: jax.Array  # int32 [max_blocks]
    start: jax.Array  # int32 [max_blocks]: first row in memory, at most S - size
    first: jax.Array  # int32 [max_blocks]: first row that is the block's own
    last: jax.Array  # int32 [max_blocks]: one past the last such row


def block_size(num_rows: int, num_experts: int) -> int:
    """Rows per block: the power of two nearest below an even share, so that little of a block is wasted."""
    share = max(1, num_rows // num_experts)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (share.bit_length() - 1)), num_rows)


def cut(group_sizes_E: jax.Array, num_rows: int, size: int) -> Blocks:
    """Cuts `num_rows` sorted rows into blocks of `size` rows, none spanning two experts.

    Args:
        group_sizes_E: int32, rows of each expert in order; their sum is at most `num_rows`.
        num_rows: S, static.
        size: rows per block, static, at most `num_rows`.

    Returns:
        The table, with room for `num_rows // size + E` blocks. An empty group has no block.
    """
    num_experts = group_sizes_E.shape[0]
    blocks_E = (group_sizes_E + size - 1) // size
    block_end_E = jnp.cumsum(blocks_E)
    row_end_E = jnp.cumsum(group_sizes_E)
    index = jnp.arange(num_rows // size + num_experts, dtype=jnp.int32)
    expert = jnp.searchsorted(block_end_E, index, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    within = index - (block_end_E - blocks_E)[expert]
    first = (row_end_E - group_sizes_E)[expert] + within * size
    last = jnp.minimum(first + size, row_end_E[expert])
    return Blocks(block_end_E[-1], expert, jnp.minimum(first, num_rows - size), first, last)
