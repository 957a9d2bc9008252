"""The routed experts' feed-forward, made of two grouped matmuls: the contract and how the parts are joined.

Where the implementation of grouped matmul has a gated form, the products of gate and up and their SwiGLU are one pass
over the rows: the hidden state is written once and read once, and the two products stay on the chip.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.kernels import quantized
from moe_jax.kernels.grouped_matmul import pallas_gpu, pallas_tpu
from moe_jax.kernels.grouped_matmul.api import grouped_matmul, require_takes
from moe_jax.kernels.quantized import Quantized

GATED = {"pallas_gpu": pallas_gpu.gated, "pallas_tpu": pallas_tpu.gated}  # by implementation of grouped matmul


def swiglu(gate_up_NI: jax.Array) -> jax.Array:
    """silu(gate) * up, where gate is the first half of the last axis (arXiv 2002.05202)."""
    gate, up = jnp.split(gate_up_NI, 2, axis=-1)
    return jax.nn.silu(gate) * up


def expert_ffn(
    rows_SD: jax.Array,
    gate_up_LEIFD: jax.Array | Quantized,
    down_LEDF: jax.Array | Quantized,
    group_sizes_E: jax.Array,
    layer: jax.Array,
    implementation: str,
) -> jax.Array:
    """Runs each group of rows through its expert: down(silu(gate(row)) * up(row)).

    Products run in the dtype of the weights, which may be wider than that of the rows, with float32 sums; those with
    weights in eight bits run in the dtype of the rows. Differentiable in rows and weights, if these are arrays: then
    gate and up are two products in one and are kept for the gradient, whatever the implementation. Runs on local
    arrays, inside `shard_map` if there is one.

    Args:
        rows_SD: rows sorted by expert; those after the last group belong to no expert and cost nothing.
        gate_up_LEIFD: the two input matrices of each layer and expert, the gate first. Those of experts without rows
            are not read.
        down_LEDF: the output matrix of each.
        group_sizes_E: int32, rows of each expert in order; the sum is at most S (not checked).
        layer: int32 scalar, which layer of the stacks.
        implementation: of grouped matmul, static.

    Returns:
        out_SD in the dtype of the rows, not weighted; zero for rows of no expert.

    Raises:
        ValueError: the implementation lacks the dtype or the widths.
    """
    run = _gated if implementation in GATED else _apart
    require_takes(implementation, gate_up_LEIFD)
    inputs = _in_dtype_of(gate_up_LEIFD, rows_SD), gate_up_LEIFD, down_LEDF, group_sizes_E, layer
    return run(*inputs, implementation).astype(rows_SD.dtype)


def _in_dtype_of(weights, rows_SX):
    """Rows in the dtype in which they are multiplied by the weights."""
    return rows_SX if isinstance(weights, Quantized) else rows_SX.astype(weights.dtype)


def _down(hidden_SF, down_LEDF, group_sizes_E, layer, implementation):
    return grouped_matmul(_in_dtype_of(down_LEDF, hidden_SF), down_LEDF, group_sizes_E, layer, implementation)


def _apart(rows_SD, gate_up_LEIFD, down_LEDF, group_sizes_E, layer, implementation):
    gate_up_LEID = jax.tree.map(lambda part: part.reshape(*part.shape[:2], -1, part.shape[-1]), gate_up_LEIFD)
    gate_up_SI = grouped_matmul(rows_SD, gate_up_LEID, group_sizes_E, layer, implementation)
    return _down(swiglu(gate_up_SI), down_LEDF, group_sizes_E, layer, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _gated(rows_SD, gate_up_LEIFD, down_LEDF, group_sizes_E, layer, implementation):
    hidden_SF = GATED[implementation](rows_SD, gate_up_LEIFD, group_sizes_E, layer)
    return _down(hidden_SF, down_LEDF, group_sizes_E, layer, implementation)


def _forward(rows_SD, gate_up_LEIFD, down_LEDF, group_sizes_E, layer, implementation):
    if quantized.holds_any((gate_up_LEIFD, down_LEDF)):
        raise ValueError(quantized.NO_GRADIENT)

    def separate(rows_SD, gate_up_LEIFD, down_LEDF):
        return _apart(rows_SD, gate_up_LEIFD, down_LEDF, group_sizes_E, layer, implementation)

    return jax.vjp(separate, rows_SD, gate_up_LEIFD, down_LEDF)


def _backward(implementation, gradients, out_grad_SD):
    return *gradients(out_grad_SD), None, None


_gated.defvjp(_forward, _backward)
