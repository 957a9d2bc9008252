"""The small parts of a layer: norms, products with weights, gated feed-forwards.

Weights lie as checkpoints store them, outputs first: a product sums over the last axes of both factors.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.grouped_matmul import native


class Stacked(NamedTuple):
    """A weight of one layer that is still within the stack of all, from which a product reads it.

    A dot reads a buffer of its own, so XLA copies a layer out of the stack before it: once more through memory, which
    is most of the time where there are few rows.
    """

    stack: jax.Array  # L first
    layer: jax.Array | int


def one_layer(stack: jax.Array, layer: jax.Array | int) -> jax.Array:
    """Takes one layer out of a stack: a copy, where a product reads it."""
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def project(x: jax.Array, weight: jax.Array | Stacked, contracted: int = 1, dtype=None) -> jax.Array:
    """Sums over the last `contracted` axes of x and of a weight; the result is of the dtype of x, or of another.

    The product is one in the dtype of the weight, which may be wider than that of x.
    """
    if not isinstance(weight, Stacked):
        axes = (tuple(range(-contracted, 0)),) * 2
        out = jnp.tensordot(x.astype(weight.dtype), weight, axes, preferred_element_type=dtype)
        return out.astype(dtype or x.dtype)
    shape = weight.stack.shape[1:]
    kept = shape[: len(shape) - contracted]
    rows = x.reshape(-1, math.prod(shape[len(kept) :])).astype(weight.stack.dtype)
    all_rows = jnp.array([rows.shape[0]], jnp.int32)  # one expert, which serves everybody
    out = native.forward(rows, weight.stack, all_rows, weight.layer, dtype)
    return out.reshape(*x.shape[: x.ndim - contracted], *kept).astype(dtype or x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Scales the last axis to unit mean square, then by `scale`; in float32, back in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * jnp.broadcast_to(scale.astype(jnp.float32), x32.shape)).astype(x.dtype)


def swiglu(gate_up_NI: jax.Array) -> jax.Array:
    """silu(gate) * up, gate being the first half of the last axis (arXiv 2002.05202)."""
    gate, up = jnp.split(gate_up_NI, 2, axis=-1)
    return jax.nn.silu(gate) * up


def feed_forward(x_ND: jax.Array, weights: dict[str, jax.Array | Stacked]) -> jax.Array:
    """A dense gated feed-forward: of the dense prefix, and of the shared experts."""
    gate_up_NIF = project(x_ND, weights["gate_up_IFD"])
    return project(swiglu(gate_up_NIF.reshape(len(x_ND), -1)), weights["down_DF"])
