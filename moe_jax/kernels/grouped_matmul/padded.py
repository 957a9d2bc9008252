"""Grouped matmul as one batched product in plain XLA, for GPUs: rows in blocks of one expert each, padded with zeros.

Every block gets a copy of its expert's matrix, so weights are read, written, and read again. There are no loops whose
trip counts depend on the data, and sums are always in the same order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.grouped_matmul import tiles
from moe_jax.kernels.grouped_matmul.stacks import in_stack


class _Layout(NamedTuple):
    """The places of sorted rows in blocks."""

    expert_B: jax.Array  # int32: the expert of each block
    row_BR: jax.Array  # int32: the sorted row at each place
    held_BR: jax.Array  # bool: whether the place holds a row
    place_S: jax.Array  # int32: the place of each sorted row, counted over all blocks
    held_S: jax.Array  # bool: whether the row belongs to an expert


def _lay_out(group_sizes_E: jax.Array, num_rows: int) -> _Layout:
    num_experts = group_sizes_E.shape[0]
    size = tiles.block_size(num_rows, num_experts)
    count = (num_rows + min(num_experts, num_rows) * (size - 1)) // size  # enough for any group sizes
    last_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    first_E = last_E - group_sizes_E
    blocks_E = tiles.num_blocks(0, group_sizes_E, size)
    last_block_E = jnp.cumsum(blocks_E, dtype=jnp.int32)
    first_block_E = last_block_E - blocks_E

    def owner(last_E, numbers):
        return jnp.minimum(jnp.searchsorted(last_E, numbers, side="right"), num_experts - 1).astype(jnp.int32)

    block_B = jnp.arange(count, dtype=jnp.int32)
    expert_B = owner(last_block_E, block_B)
    begin_B = first_E[expert_B] + (block_B - first_block_E[expert_B]) * size
    row_BR = begin_B[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    row_S = jnp.arange(num_rows, dtype=jnp.int32)
    expert_S = owner(last_E, row_S)
    return _Layout(
        expert_B,
        row_BR,
        row_BR < last_E[expert_B][:, None],
        first_block_E[expert_S] * size + row_S - first_E[expert_S],
        row_S < last_E[-1],
    )


def _to_blocks(rows_SX: jax.Array, layout: _Layout) -> jax.Array:
    return jnp.where(layout.held_BR[..., None], rows_SX.at[layout.row_BR].get(mode="clip"), 0)


def _multiply(rows_SX, weights_LEFD, layout, layer, equation):
    weights_BFD = weights_LEFD[layer, layout.expert_B]
    rows_BRX = _to_blocks(rows_SX, layout)
    out_BRY = jnp.einsum(equation, rows_BRX, weights_BFD, preferred_element_type=jnp.float32).astype(rows_SX.dtype)
    out_SY = out_BRY.reshape(-1, out_BRY.shape[-1]).at[layout.place_S].get(mode="clip")
    return jnp.where(layout.held_S[:, None], out_SY, 0)


def forward(rows_SD, weights_LEFD, group_sizes_E, layer):
    """As `api.grouped_matmul`."""
    layout = _lay_out(group_sizes_E, rows_SD.shape[0])
    return _multiply(rows_SD, weights_LEFD, layout, layer, "brd,bfd->brf")


def backward(rows_SD, weights_LEFD, group_sizes_E, layer, out_grad_SF):
    """As `reference.backward`."""
    layout = _lay_out(group_sizes_E, rows_SD.shape[0])
    rows_grad_SD = _multiply(out_grad_SF, weights_LEFD, layout, layer, "brf,bfd->brd")
    blocks = (_to_blocks(out_grad_SF, layout), _to_blocks(rows_SD, layout))
    grad_BFD = jnp.einsum("brf,brd->bfd", *blocks, preferred_element_type=jnp.float32)
    belongs_EB = jnp.arange(group_sizes_E.shape[0])[:, None] == layout.expert_B[None]
    exact = lax.Precision.HIGHEST  # a product with ones and zeros is an exact sum
    grad_EFD = jnp.einsum("eb,bfd->efd", belongs_EB.astype(jnp.float32), grad_BFD, precision=exact)
    return rows_grad_SD, in_stack(grad_EFD, weights_LEFD, layer)
