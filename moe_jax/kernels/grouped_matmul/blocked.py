"""Grouped matmul in plain XLA, for CPUs: a loop over row blocks whose trip count is data.

Each trip multiplies one block of rows by the matrix of its expert, taken out of the whole stack by index. Experts
without rows and rows that no group holds cost nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.grouped_matmul import tiles


def _own_rows(blocks: tiles.Blocks, i: jax.Array, size: int) -> jax.Array:
    row = blocks.start[i] + jnp.arange(size, dtype=jnp.int32)
    return ((row >= blocks.first[i]) & (row < blocks.last[i]))[:, None]


def _multiply(rows_SX, weights_LEDF, group_sizes_E, layer, *, transposed: bool):
    """Rows by matrices [D, F], or by their transposes: out is [S, F] or [S, D]."""
    num_rows = rows_SX.shape[0]
    num_experts, *matrix = weights_LEDF.shape[1:]
    size = tiles.block_size(num_rows, num_experts)
    blocks = tiles.cut(group_sizes_E, num_rows, size)
    contract = ((1,), (1 if transposed else 0,)), ((), ())

    def body(i, out):
        rows = lax.dynamic_slice_in_dim(rows_SX, blocks.start[i], size)
        weight = lax.dynamic_slice(weights_LEDF, (layer, blocks.expert[i], 0, 0), (1, 1, *matrix))[0, 0]
        new = lax.dot_general(rows, weight, contract, preferred_element_type=jnp.float32).astype(out.dtype)
        old = lax.dynamic_slice_in_dim(out, blocks.start[i], size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(_own_rows(blocks, i, size), new, old), blocks.start[i], 0)

    out = jnp.zeros((num_rows, matrix[0] if transposed else matrix[1]), rows_SX.dtype)
    return lax.fori_loop(0, blocks.count, body, out)


def forward(rows_SD, weights_LEDF, group_sizes_E, layer):
    """As `api.grouped_matmul`."""
    return _multiply(rows_SD, weights_LEDF, group_sizes_E, layer, transposed=False)


def backward(rows_SD, weights_LEDF, group_sizes_E, layer, out_grad_SF):
    """As `reference.backward`."""
    rows_grad_SD = _multiply(out_grad_SF, weights_LEDF, group_sizes_E, layer, transposed=True)
    num_rows = rows_SD.shape[0]
    num_experts, *matrix = weights_LEDF.shape[1:]
    size = tiles.block_size(num_rows, num_experts)
    blocks = tiles.cut(group_sizes_E, num_rows, size)

    def body(i, grad):
        rows = lax.dynamic_slice_in_dim(rows_SD, blocks.start[i], size)
        rows = jnp.where(_own_rows(blocks, i, size), rows, 0)
        out_grad = lax.dynamic_slice_in_dim(out_grad_SF, blocks.start[i], size)
        new = lax.dot_general(rows, out_grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        at = (blocks.expert[i], 0, 0)
        old = lax.dynamic_slice(grad, at, (1, *matrix))
        return lax.dynamic_update_slice(grad, old + new[None], at)

    grad_EDF = lax.fori_loop(0, blocks.count, body, jnp.zeros((num_experts, *matrix), jnp.float32))
    weights_grad_LEDF = lax.dynamic_update_slice(
        jnp.zeros_like(weights_LEDF), grad_EDF.astype(weights_LEDF.dtype)[None], (layer, 0, 0, 0)
    )
    return rows_grad_SD, weights_grad_LEDF
