"""Grouped matmul: the contract and the implementations."""

import functools

import jax

from moe_jax.kernels import quantized
from moe_jax.kernels.grouped_matmul import blocked, native, padded, pallas_gpu, pallas_tpu, ragged_dot
from moe_jax.kernels.quantized import Quantized

IMPLEMENTATIONS = {
    "native": native,
    "blocked": blocked,
    "padded": padded,
    "ragged_dot": ragged_dot,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu": pallas_tpu,
}
BY_PLATFORM = {  # the best first
    "cpu": ("native", "blocked"),
    "gpu": ("pallas_gpu", "padded", "blocked"),
    "tpu": ("pallas_tpu", "ragged_dot", "blocked"),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(
    rows_SD: jax.Array,
    weights_LEFD: jax.Array | Quantized,
    group_sizes_E: jax.Array,
    layer: jax.Array,
    implementation: str,
) -> jax.Array:
    """Multiplies each group of rows by the matrix of its expert.

    Differentiable in rows and weights, unless these are in eight bits. Sums are float32. The gradient for the weights
    is as large as the stack, so training passes a stack of one layer. Runs on local arrays, inside `shard_map` if there
    is one.

    Args:
        rows_SD: rows sorted by expert; those after the last group belong to no expert and cost nothing.
        weights_LEFD: one matrix per layer and expert, outputs first, as checkpoints store them. Those of experts
            without rows are not read. Those in eight bits count as their values times their scales.
        group_sizes_E: int32, rows of each expert in order; the sum is at most S (not checked).
        layer: int32 scalar, which layer of the stack.
        implementation: a name from `IMPLEMENTATIONS`, static.

    Returns:
        out_SF in the dtype of the rows; zero for rows of no expert.

    Raises:
        ValueError: the implementation lacks the dtypes or the widths.
    """
    require_takes(implementation, weights_LEFD)
    return IMPLEMENTATIONS[implementation].forward(rows_SD, weights_LEFD, group_sizes_E, layer)


def takes(implementation: str, dtype: str) -> bool:
    """Whether an implementation takes weights in eight bits of this dtype."""
    return dtype in getattr(IMPLEMENTATIONS[implementation], "EIGHT_BITS", ())


def require_takes(implementation: str, weights_LEFD: jax.Array | Quantized) -> None:
    """Raises ValueError if weights are in eight bits, and the implementation does not take those."""
    if isinstance(weights_LEFD, Quantized) and not takes(implementation, name := weights_LEFD.values.dtype.name):
        known = ", ".join(one for one in IMPLEMENTATIONS if takes(one, name))
        raise ValueError(f"{implementation} takes no weights in eight bits ({name}): expected one of {known}")


def _forward(rows_SD, weights_LEFD, group_sizes_E, layer, implementation):
    if isinstance(weights_LEFD, Quantized):
        raise ValueError(quantized.NO_GRADIENT)
    out_SF = grouped_matmul(rows_SD, weights_LEFD, group_sizes_E, layer, implementation)
    return out_SF, (rows_SD, weights_LEFD, group_sizes_E, layer)


def _backward(implementation, residuals, out_grad_SF):
    return *IMPLEMENTATIONS[implementation].backward(*residuals, out_grad_SF), None, None


grouped_matmul.defvjp(_forward, _backward)
