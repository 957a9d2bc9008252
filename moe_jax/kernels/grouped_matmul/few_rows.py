"""Products of few rows with large matrices, in plain XLA for CPUs: bound by how fast the weights are read.

A dot reads a buffer of its own, so XLA copies a slice of a stack before it: once more through memory, the larger part
of a decode step. A sum of products that is written out is fused with the slices and reads them where they lie; that
pays for one row. From two rows on a dot is worth its copy, if that goes by tiles which stay in the processor's cache.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.grouped_matmul import tiles

MOST_ROWS = 8  # of a block: beyond it, arithmetic takes longer than the copy
SMALLEST_MATRIX = 1 << 18  # values; XLA runs a loop over smaller ones as one piece of code, which is faster
TERMS = 16  # products added up at once
TILE = 512  # rows of a matrix that are copied at once


def worthwhile(block_size: int, weights_LEDF: jax.Array) -> bool:
    """Whether blocks of so many rows and matrices of this size are a case for this file."""
    return block_size <= MOST_ROWS and math.prod(weights_LEDF.shape[2:]) >= SMALLEST_MATRIX


def one_row(row_D: jax.Array, weights_LEDF: jax.Array, layer: jax.Array, expert: jax.Array | int) -> jax.Array:
    """One row times one matrix of a stack, read in place: float32 [F]."""
    num_layers, num_experts, width, num_columns = weights_LEDF.shape
    terms = math.gcd(width, TERMS)
    split = weights_LEDF.reshape(num_layers, num_experts, width // terms, terms, num_columns)
    row_parts = row_D.astype(jnp.float32).reshape(-1, terms)
    sums = jnp.zeros((width // terms, num_columns), jnp.float32)
    for term in range(terms):
        part = lax.dynamic_slice(split, (layer, expert, 0, term, 0), (1, 1, width // terms, 1, num_columns))
        sums = sums + row_parts[:, term, None] * part.reshape(sums.shape).astype(jnp.float32)
    return lax.optimization_barrier(sums).sum(axis=0)  # fused with this sum, the slices would be copied again


def forward(rows_SD: jax.Array, weights_LEDF: jax.Array, group_sizes_E: jax.Array, layer: jax.Array) -> jax.Array:
    """As `api.grouped_matmul`: experts with one row first, then the others."""
    num_rows, width = rows_SD.shape
    num_columns = weights_LEDF.shape[3]
    size = min(num_rows, MOST_ROWS)
    tile = math.gcd(width, TILE)
    single = tiles.busy_groups(group_sizes_E, group_sizes_E == 1)
    several = tiles.busy_groups(group_sizes_E, group_sizes_E > 1)

    def of_single(i, out_SF):
        row_D = lax.dynamic_index_in_dim(rows_SD, single.first_E[i], keepdims=False)
        new_F = one_row(row_D, weights_LEDF, layer, single.expert_E[i])
        return lax.dynamic_update_slice(out_SF, new_F[None], (single.first_E[i], 0))

    def of_several(i, out_SF):
        first, last = several.first_E[i], several.last_E[i]

        def of_tile(number, out_SF):
            at = (layer, several.expert_E[i], number * tile, 0)
            weight = lax.dynamic_slice(weights_LEDF, at, (1, 1, tile, num_columns))[0, 0]

            def of_block(block, out_SF):
                start, own = tiles.block(first, last, block, size, num_rows)
                rows = lax.dynamic_slice(rows_SD, (start, number * tile), (size, tile))
                new = jnp.where(own, jnp.dot(rows, weight, preferred_element_type=jnp.float32), 0)
                new = new + lax.dynamic_slice_in_dim(out_SF, start, size)
                return lax.dynamic_update_slice_in_dim(out_SF, new, start, 0)

            return lax.fori_loop(0, tiles.num_blocks(first, last, size), of_block, out_SF)

        return lax.fori_loop(0, width // tile, of_tile, out_SF)

    out_SF = lax.fori_loop(0, single.count, of_single, jnp.zeros((num_rows, num_columns), jnp.float32))
    if num_rows > 1:
        out_SF = lax.fori_loop(0, several.count, of_several, out_SF)
    return out_SF.astype(rows_SD.dtype)
