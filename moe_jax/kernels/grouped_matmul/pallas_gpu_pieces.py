"""What each piece of the output of `pallas_gpu` loads and stores: read by the kernels, and by what counts bytes.

Pure functions of int32 scalars. A description has static fields, and

- `most_pieces`: static; `count(tables)`: those that there are, an int32 scalar;
- `piece(number, tables)`: one piece; its `blocks` are loaded one after the other, in depth;
- `loads(piece, block)`: choices; of each, one alternative is loaded: a list of `LoadedBlock`;
- `store(piece, warpgroup)`: the `Store` of 64 rows.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.grouped_matmul.pallas_gpu import Tiles
from moe_jax.kernels.grouped_matmul.pallas_gpu_rows import ALIGNMENT, most_tiles, row_tiles, tile_at

WARPGROUP_ROWS = 64  # of the output, per warpgroup: what one wgmma takes
_STORE_COLUMNS = (64, 32)  # of one copy: a swizzled row of 128 or 64 bytes


class LoadedBlock(NamedTuple):
    """A block of an operand that one copy brings into a slot of a ring. What lies outside the operand is not read."""

    operand: int  # its number
    matrix: jax.Array | None  # index on the first axis, if the operand has three
    start: tuple[Any, Any]
    size: tuple[int, int]
    ring: int  # 0: the left operand of the product, 1: the right one
    place: int = 0  # first row within the slot


class Load(NamedTuple):
    """Loads of which one is made."""

    taken: Any  # int32: which; 0 where there is one
    alternatives: list[list[LoadedBlock]]


class Store(NamedTuple):
    """Rows `begin` up to `end` of a warpgroup's 64, which go to `row` and after; outside the output nothing is."""

    matrix: jax.Array | None  # index on the first axis, if the output has three
    row: jax.Array
    begin: Any  # int32, or an int where all rows are stored
    end: Any
    column: jax.Array
    width: Any  # columns: int32, or an int; a multiple of those that are stored at once

    def copies(self) -> list[tuple[Any, Any, int]]:
        """(whether it is made, its first row, its rows) of each copy: a power of two of rows."""
        count = self.end - self.begin
        sizes = [1 << bit for bit in reversed(range(WARPGROUP_ROWS.bit_length()))]
        if isinstance(count, int):
            sizes = [size for size in sizes if count & size]
        return [((count & size) != 0, self.begin + (count & ~(2 * size - 1)), size) for size in sizes]


def _ceil(size: int, unit: int) -> int:
    return -(-size // unit)


class ProductPiece(NamedTuple):
    """A tile of rows of one expert, times some columns of its matrix."""

    blocks: jax.Array  # 0: rows of no expert, or no rows
    matrix: jax.Array
    start: jax.Array  # first row of the tile
    begin: jax.Array  # the expert's own rows within it
    end: jax.Array
    column: jax.Array
    narrower: jax.Array  # which of `ProductPieces.widths`


class ProductPieces(NamedTuple):
    """Rows by matrices [F, D] along D, or by their transposes; gated: by two matrices each.

    With one warpgroup, pieces may be narrower than a tile, so that the columns of few experts are spread over all
    cores. All pieces of a launch have the same width.

    Operands: rows, matrices.
    """

    tiles: Tiles
    num_cores: int
    num_experts: int
    num_rows: int  # a multiple of `ALIGNMENT`
    depth: int
    width: int  # columns of the output
    transposed: bool = False
    gated: bool = False

    @classmethod
    def of(
        cls, rows_SX, weights_LEFD, tiles: Tiles, num_cores: int, transposed: bool = False, gated: bool = False
    ) -> Self:
        """Describes a product of arrays, of which only the shapes are read; rows are then aligned."""
        num_rows, depth = rows_SX.shape
        aligned = num_rows + -num_rows % ALIGNMENT
        width = weights_LEFD.shape[-1 if transposed else -2]
        return cls(tiles, num_cores, weights_LEFD.shape[1], aligned, depth, width, transposed, gated)

    @property
    def out_columns(self) -> int:
        """Columns of the widest piece."""
        return self.tiles.columns // 2 if self.gated else self.tiles.columns

    @property
    def widths(self) -> tuple[int, ...]:
        """The columns that a piece may have, the widest first."""
        if self.warpgroups > 1 or self.transposed or self.out_columns % _STORE_COLUMNS[1]:
            return (self.out_columns,)
        return tuple(range(self.out_columns, 0, -_STORE_COLUMNS[1]))

    @property
    def store_columns(self) -> int:
        """Columns that are stored at once."""
        return _STORE_COLUMNS[len(self.widths) > 1]

    @property
    def _tiles(self) -> int:
        return most_tiles(self.num_experts, self.num_rows, self.tiles.rows)

    def narrower(self, tables) -> jax.Array:
        """Which of `widths`: the one with which the busiest core loads the least.

        Each piece loads its rows again. They count twice, so that little is not saved by many more copies.
        """
        if len(self.widths) == 1:
            return jnp.int32(0)
        _, _, first_tile_T, *_ = tables
        busy = lax.max(first_tile_T[self._tiles - 1], jnp.int32(1))  # the last tile comes after those of all experts
        rows = ALIGNMENT + lax.div(jnp.int32(self.num_rows), busy)
        chosen, least = jnp.int32(0), jnp.int32(2**31 - 1)
        for number, width in enumerate(self.widths):
            pieces = lax.div(busy * _ceil(self.width, width) + (self.num_cores - 1), jnp.int32(self.num_cores))
            loaded = pieces * (width * (2 if self.gated else 1) + 2 * rows)
            chosen = lax.select(loaded < least, jnp.int32(number), chosen)
            least = lax.min(loaded, least)
        return chosen

    def _of_width(self, narrower, values) -> jax.Array:
        """The value of the width that was chosen."""
        chosen = jnp.int32(values[0])
        for number, value in enumerate(values[1:], 1):
            chosen = lax.select(narrower == number, jnp.int32(value), chosen)
        return chosen

    @property
    def warpgroups(self) -> int:
        """Those that multiply and store."""
        return self.tiles.rows // WARPGROUP_ROWS

    @property
    def most_pieces(self) -> int:
        """Those of the least width, empty ones included."""
        return self._tiles * _ceil(self.width, self.widths[-1])

    def count(self, tables) -> jax.Array:
        """Empty ones included."""
        return self._tiles * self._of_width(self.narrower(tables), [_ceil(self.width, one) for one in self.widths])

    def tables(self, group_sizes_E, layer) -> tuple[jax.Array, ...]:
        """What the kernel is given beside its operands."""
        return jnp.asarray(layer, jnp.int32)[None], *row_tiles(group_sizes_E, self.num_rows, self.tiles.rows)

    def piece(self, number, tables) -> ProductPiece:
        """All columns of a tile of rows come one after the other."""
        layer, *entries = tables
        narrower = self.narrower(tables)
        column_tiles = self._of_width(narrower, [_ceil(self.width, width) for width in self.widths])
        tile = lax.div(number, column_tiles)
        column = lax.rem(number, column_tiles) * self._of_width(narrower, self.widths)
        entry = [entry_T[tile] for entry_T in entries]
        group, start, begin, end = tile_at(entry, tile, self.num_experts, self.num_rows, self.tiles.rows)
        busy = (group < self.num_experts) & (end > begin)
        blocks = lax.select(busy, jnp.int32(_ceil(self.depth, self.tiles.depth)), jnp.int32(0))
        return ProductPiece(blocks, layer[0] * self.num_experts + group, start, begin, end, column, narrower)

    def loads(self, piece: ProductPiece, block) -> list[Load]:
        """Rows, of a short tile the least multiple of 8 that holds them; and one block of columns, or two."""
        tiles, deep = self.tiles, block * self.tiles.depth
        sizes, taken = [tiles.rows], jnp.int32(0)
        if self.warpgroups == 1:
            sizes = range(ALIGNMENT, tiles.rows + 1, ALIGNMENT)
            taken = lax.div(lax.max(piece.end, 1) - 1, jnp.int32(ALIGNMENT))
        rows = [[LoadedBlock(0, None, (piece.start, deep), (size, tiles.depth), 0)] for size in sizes]
        columns = [self._columns(piece, deep, width) for width in self.widths]
        return [Load(taken, rows), Load(piece.narrower, columns)]

    def _columns(self, piece: ProductPiece, deep, width: int) -> list[LoadedBlock]:
        depth, start = self.tiles.depth, (piece.column, deep)
        if self.transposed:
            return [LoadedBlock(1, piece.matrix, (deep, piece.column), (depth, width), 1)]
        if not self.gated:
            return [LoadedBlock(1, piece.matrix, start, (width, depth), 1)]
        return [
            LoadedBlock(1, 2 * piece.matrix + half, start, (width, depth), 1, half * self.out_columns)
            for half in range(2)
        ]

    def store(self, piece: ProductPiece, warpgroup) -> Store:
        """The expert's own rows; where there is no expert, all, as zeros."""
        row = warpgroup * WARPGROUP_ROWS
        begin, end = (lax.clamp(jnp.int32(0), x - row, jnp.int32(WARPGROUP_ROWS)) for x in (piece.begin, piece.end))
        width = self._of_width(piece.narrower, self.widths) if len(self.widths) > 1 else self.out_columns
        return Store(None, piece.start + row, begin, end, piece.column, width)


class GradientPiece(NamedTuple):
    """A part of one expert's gradient."""

    blocks: jax.Array  # of rows; 0: an expert without any
    expert: jax.Array
    row: jax.Array
    column: jax.Array
    base: jax.Array  # first row of the first block


class GradientPieces(NamedTuple):
    """[E, F, D]: the transposed gradient of each expert's outputs times its rows; blocks of rows are the depth.

    Operands: gradient, rows, and of both a copy of each expert's first and last block in which rows of others are zero.
    """

    tiles: Tiles
    num_experts: int
    d_out: int
    d_model: int

    @classmethod
    def of(cls, rows_SD, out_grad_SF, num_experts: int, tiles: Tiles) -> Self:
        """Describes the gradient from arrays of which only the shapes are read."""
        return cls(tiles, num_experts, out_grad_SF.shape[1], rows_SD.shape[1])

    @property
    def out_columns(self) -> int:
        """Columns of a piece."""
        return self.tiles.columns

    @property
    def _down_tiles(self) -> int:
        return _ceil(self.d_out, self.tiles.rows)

    @property
    def _column_tiles(self) -> int:
        return _ceil(self.d_model, self.tiles.columns)

    @property
    def store_columns(self) -> int:
        """Columns that are stored at once."""
        return _STORE_COLUMNS[0]

    @property
    def warpgroups(self) -> int:
        """Those that multiply and store."""
        return self.tiles.rows // WARPGROUP_ROWS

    @property
    def most_pieces(self) -> int:
        """Those of experts without rows included."""
        return self.num_experts * self._down_tiles * self._column_tiles

    def count(self, tables) -> jax.Array:
        """All."""
        return jnp.int32(self.most_pieces)

    def tables(self, group_sizes_E) -> tuple[jax.Array, jax.Array]:
        """First row of each expert, and one past its last."""
        last_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
        return last_E - group_sizes_E, last_E

    def piece(self, number, tables) -> GradientPiece:
        """All columns of some rows of a gradient come one after the other."""
        first_E, last_E = tables
        tiles = self.tiles
        column = lax.rem(number, jnp.int32(self._column_tiles)) * tiles.columns
        number = lax.div(number, jnp.int32(self._column_tiles))
        expert = lax.div(number, jnp.int32(self._down_tiles))
        row = lax.rem(number, jnp.int32(self._down_tiles)) * tiles.rows
        first, last = first_E[expert], last_E[expert]
        base = lax.div(first, jnp.int32(ALIGNMENT)) * ALIGNMENT
        blocks = lax.div(last - base + (tiles.depth - 1), jnp.int32(tiles.depth))
        return GradientPiece(lax.select(last > first, blocks, jnp.int32(0)), expert, row, column, base)

    def loads(self, piece: GradientPiece, block) -> list[Load]:
        """A block of both operands, or at the edges of the expert's rows of their copies."""
        tiles = self.tiles

        def both(gradient, rows, start):
            return [
                LoadedBlock(gradient, None, (start, piece.row), (tiles.depth, tiles.rows), 0),
                LoadedBlock(rows, None, (start, piece.column), (tiles.depth, tiles.columns), 1),
            ]

        at_edge = (block == 0) | (block == piece.blocks - 1)
        edge = (piece.expert * 2 + lax.min(block, jnp.int32(1))) * tiles.depth
        inner = both(0, 1, piece.base + block * tiles.depth)
        return [Load(at_edge.astype(jnp.int32), [inner, both(2, 3, edge)])]

    def store(self, piece: GradientPiece, warpgroup) -> Store:
        """All rows."""
        row = piece.row + warpgroup * WARPGROUP_ROWS
        return Store(piece.expert, row, 0, WARPGROUP_ROWS, piece.column, self.tiles.columns)
