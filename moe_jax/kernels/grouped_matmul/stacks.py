"""Gradients for stacks of weights, of which a product reads one layer."""

import jax
import jax.numpy as jnp
from jax import lax


def in_stack(grad_EFD: jax.Array, weights_LEFD: jax.Array, layer: jax.Array) -> jax.Array:
    """The gradient for a stack, given that for the layer that was read; a stack of one is not copied."""
    grad_LEFD = grad_EFD[None].astype(weights_LEFD.dtype)
    if len(weights_LEFD) == 1:
        return grad_LEFD
    return lax.dynamic_update_slice(jnp.zeros_like(weights_LEFD), grad_LEFD, (layer, 0, 0, 0))
