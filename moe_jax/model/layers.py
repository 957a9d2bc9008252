"""The small parts of a layer: norms, products with weights, gated feed-forwards.

Weights have outputs first, as checkpoints store them: a product sums over the last axes of both factors.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.kernels.projection import xla
from moe_jax.kernels.projection.api import projection


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A matrix of one layer, which a product reads within the stack of all layers."""

    stack: jax.Array  # L first
    layer: jax.Array | int
    implementation: str  # of `projection`

    def taken(self) -> jax.Array:
        """The matrix by itself; XLA copies it for a product."""
        return one_layer(self.stack, self.layer)


def one_layer(stack: jax.Array, layer: jax.Array | int) -> jax.Array:
    """Takes one layer out of a stack; XLA copies it for a product."""
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def project(x: jax.Array, weight: jax.Array | Stacked, contracted: int = 1, dtype=None) -> jax.Array:
    """Sums over the last `contracted` axes of x and of a weight; the result has the dtype of x unless `dtype` is given.

    The product runs in the dtype of the weight, which may be wider than that of x.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(weight, Stacked):
        return projection(x, weight.stack, weight.layer, contracted, dtype, weight.implementation)
    return xla.multiply(x, weight, contracted, dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Scales the last axis to unit mean square, then by `scale`; computed in float32, returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * jnp.broadcast_to(scale.astype(jnp.float32), x32.shape)).astype(x.dtype)


def feed_forward(x_ND: jax.Array, weights: dict[str, jax.Array | Stacked]) -> jax.Array:
    """A gated feed-forward, for dense layers and shared experts.

    Gate and up stay apart, since F may be split over devices: joined into one axis, they would be gathered.
    """
    gate_up_NIF = project(x_ND, weights["gate_up_IFD"])
    return project(jax.nn.silu(gate_up_NIF[:, 0]) * gate_up_NIF[:, 1], weights["down_DF"])
