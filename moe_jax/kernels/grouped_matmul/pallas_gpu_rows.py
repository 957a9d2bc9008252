"""Which rows a tile of `pallas_gpu` holds: a table, made before the kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ALIGNMENT = 8  # rows: copies into swizzled shared memory start at a multiple


class _RowTiles(NamedTuple):
    """Tiles of rows: of the groups in order, then of the rows of no group; some tiles are empty."""

    group_T: jax.Array  # int32: the group; the number of experts for rows of no group
    first_tile_T: jax.Array  # int32: first tile of the group
    first_T: jax.Array  # int32: first row of the group
    size_T: jax.Array  # int32: rows of the group; 0 for rows of no group


def most_tiles(num_experts: int, num_rows: int, size: int) -> int:
    """How many tiles of rows there may be."""
    busy = min(num_experts, num_rows)
    if num_rows + ALIGNMENT - 1 <= size:  # each group fits in one tile, and so do the rows of no group
        return busy + 1
    return (num_rows + busy * (ALIGNMENT - 1)) // size + busy + 2


def row_tiles(group_sizes_E, num_rows: int, size: int) -> _RowTiles:
    """Cuts sorted rows into tiles, in two sums over small comparisons: each kernel launched costs microseconds."""
    num_experts = group_sizes_E.shape[0]
    expert_E = jnp.arange(num_experts)
    # A group may start anywhere within the 8 rows to which its first tile is aligned.
    tiles_E = jnp.where(group_sizes_E > 0, (group_sizes_E + (ALIGNMENT - 1 + size - 1)) // size, 0)
    last_tile_E = jnp.where(expert_E[:, None] >= expert_E[None], tiles_E[None], 0).sum(1, dtype=jnp.int32)
    tile_T = jnp.arange(most_tiles(num_experts, num_rows, size), dtype=jnp.int32)
    over_TE = last_tile_E[None] <= tile_T[:, None]
    here_TE = ~over_TE & (last_tile_E[None] - tiles_E[None] <= tile_T[:, None])
    ones_E = jnp.ones_like(tiles_E)
    sums = [(over_TE, ones_E), (over_TE, tiles_E), (over_TE, group_sizes_E), (here_TE, group_sizes_E)]
    terms = tuple(jnp.where(where_TE, value_E[None], 0).astype(jnp.int32) for where_TE, value_E in sums)
    zero = jnp.int32(0)

    def add(left, right):
        return tuple(a + b for a, b in zip(left, right))

    group_T, first_tile_T, first_T, size_T = lax.reduce(terms, (zero,) * 4, add, (1,))
    return _RowTiles(group_T, first_tile_T, first_T, size_T)


def tile_at(entry, tile, num_experts: int, num_rows: int, size: int):
    """(group, first row, begin, end): the tile's own rows are `begin` up to `end`, counted from its first row.

    Args:
        entry: the tile's row of the table.
        tile: its number.
        num_experts: number of groups.
        num_rows: all rows, those of no group included.
        size: rows of a tile.
    """
    group, first_tile, first, rows = entry
    last = lax.select(group < num_experts, first + rows, jnp.int32(num_rows))
    block = lax.div(first, jnp.int32(ALIGNMENT)) + (tile - first_tile) * (size // ALIGNMENT)
    start = block * ALIGNMENT
    begin = lax.max(first - start, jnp.int32(0))
    return group, start, begin, lax.clamp(begin, last - start, jnp.int32(size))
