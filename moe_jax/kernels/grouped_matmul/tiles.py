"""Loops over sorted groups: expert by expert, and block by block of an expert's rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST_BLOCK = 256


class Groups(NamedTuple):
    """The experts that have rows, in the first `count` entries."""

    count: jax.Array  # int32 scalar
    expert_E: jax.Array  # int32
    first_E: jax.Array  # int32: first row of that expert
    last_E: jax.Array  # int32: one past its last row


def block_size(num_rows: int, num_experts: int) -> int:
    """Rows per block: a power of two near half an even share, so that a group's last block wastes little."""
    half_share = num_rows // (2 * num_experts)
    return min(LARGEST_BLOCK, 1 << max(half_share.bit_length() - 1, 0))


def busy_groups(group_sizes_E: jax.Array) -> Groups:
    """Lists the experts that have rows, in order.

    Args:
        group_sizes_E: int32, rows of each expert; rows lie in the order of the experts.
    """
    order_E = jnp.argsort(group_sizes_E == 0, stable=True).astype(jnp.int32)
    last_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    first_E = last_E - group_sizes_E
    return Groups((group_sizes_E > 0).sum(dtype=jnp.int32), order_E, first_E[order_E], last_E[order_E])


def num_blocks(first: jax.Array, last: jax.Array, size: int) -> jax.Array:
    """The number of blocks of `size` rows that cover rows `first` up to `last`."""
    return (last - first + size - 1) // size


def block(
    first: jax.Array, last: jax.Array, number: jax.Array, size: int, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Locates one block of a group.

    Args:
        first: first row of the group.
        last: one past its last row.
        number: the number of the block within the group.
        size: rows per block, at most `num_rows`.
        num_rows: S, where the last block must end.

    Returns:
        The first of `size` rows to read, and own_N1: which of them belong to the block.
    """
    begin = first + number * size
    start = jnp.minimum(begin, num_rows - size)
    row = start + jnp.arange(size, dtype=jnp.int32)
    return start, ((row >= begin) & (row < last))[:, None]
