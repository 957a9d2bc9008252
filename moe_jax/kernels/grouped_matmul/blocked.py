"""Grouped matmul in plain XLA, for CPUs without a C++ compiler and for gradients: loops with trip counts from the data.

The outer loop is over the experts that have rows, and copies the matrix of each out of the stack, once; one in eight
bits is dequantised then. The inner loop is over blocks of its rows. Experts without rows, and rows of no expert, cost
nothing. With few rows, the copy is most of the work; XLA cannot be made to avoid it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels import quantized
from moe_jax.kernels.grouped_matmul import tiles
from moe_jax.kernels.grouped_matmul.stacks import in_stack
from moe_jax.kernels.quantized import Quantized

EIGHT_BITS = quantized.DTYPES


def _matrix(weights_LEFD, layer, expert, dtype):
    """[F, D] of one expert."""

    def take(stack):
        return lax.dynamic_slice(stack, (layer, expert, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]

    if isinstance(weights_LEFD, Quantized):
        return quantized.dequantize(take(weights_LEFD.values), take(weights_LEFD.scale), dtype)
    return take(weights_LEFD)


def _multiply(rows_SX, weights_LEFD, group_sizes_E, layer, *, transposed: bool):
    """Products of rows with matrices [F, D] along D, or transposed, along F: out is [S, F] or [S, D]."""
    num_rows = rows_SX.shape[0]
    num_experts, *matrix = weights_LEFD.shape[1:]
    size = tiles.block_size(num_rows, num_experts)
    groups = tiles.busy_groups(group_sizes_E)
    contract = ((1,), (0 if transposed else 1,)), ((), ())

    def multiply_expert(i, out):
        first, last = groups.first_E[i], groups.last_E[i]
        weight = _matrix(weights_LEFD, layer, groups.expert_E[i], rows_SX.dtype)

        def multiply_block(number, out):
            start, own = tiles.block(first, last, number, size, num_rows)
            rows = lax.dynamic_slice_in_dim(rows_SX, start, size)
            new = lax.dot_general(rows, weight, contract, preferred_element_type=jnp.float32).astype(out.dtype)
            new = jnp.where(own, new, lax.dynamic_slice_in_dim(out, start, size))
            return lax.dynamic_update_slice_in_dim(out, new, start, 0)

        return lax.fori_loop(0, tiles.num_blocks(first, last, size), multiply_block, out)

    out = jnp.zeros((num_rows, matrix[1 if transposed else 0]), rows_SX.dtype)
    return lax.fori_loop(0, groups.count, multiply_expert, out)


def forward(rows_SD, weights_LEFD, group_sizes_E, layer):
    """As `api.grouped_matmul`."""
    return _multiply(rows_SD, weights_LEFD, group_sizes_E, layer, transposed=False)


def _weights_gradient(rows_SD, group_sizes_E, out_grad_SF) -> jax.Array:
    """float32 [E, F, D]: for each expert, the transposed gradient of its outputs times its rows."""
    num_rows, num_experts = rows_SD.shape[0], group_sizes_E.shape[0]
    size = tiles.block_size(num_rows, num_experts)
    groups = tiles.busy_groups(group_sizes_E)
    matrix = (out_grad_SF.shape[1], rows_SD.shape[1])
    contract = ((0,), (0,)), ((), ())

    def expert_gradient(i, grad_EFD):
        first, last = groups.first_E[i], groups.last_E[i]

        def add_block(number, grad_FD):
            start, own = tiles.block(first, last, number, size, num_rows)
            rows = jnp.where(own, lax.dynamic_slice_in_dim(rows_SD, start, size), 0)
            out_grad = jnp.where(own, lax.dynamic_slice_in_dim(out_grad_SF, start, size), 0)
            return grad_FD + lax.dot_general(out_grad, rows, contract, preferred_element_type=jnp.float32)

        blocks = tiles.num_blocks(first, last, size)
        grad_FD = lax.fori_loop(0, blocks, add_block, jnp.zeros(matrix, jnp.float32))
        return lax.dynamic_update_slice(grad_EFD, grad_FD[None], (groups.expert_E[i], 0, 0))

    return lax.fori_loop(0, groups.count, expert_gradient, jnp.zeros((num_experts, *matrix), jnp.float32))


def backward(rows_SD, weights_LEFD, group_sizes_E, layer, out_grad_SF):
    """As `reference.backward`."""
    rows_grad_SD = _multiply(out_grad_SF, weights_LEFD, group_sizes_E, layer, transposed=True)
    grad_EFD = _weights_gradient(rows_SD, group_sizes_E, out_grad_SF)
    return rows_grad_SD, in_stack(grad_EFD, weights_LEFD, layer)
