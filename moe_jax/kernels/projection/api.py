"""A product with one layer's matrix, which lies within the stack of all layers: the contract, and the implementations.

A dot reads a buffer of its own, so XLA copies a layer out of the stack before it: once more through memory, which is
most of the time where there are few rows.
"""

import jax
import jax.numpy as jnp

from moe_jax.kernels.projection import native, xla

IMPLEMENTATIONS = {"native": native, "xla": xla}
BY_PLATFORM = {"cpu": "native", "gpu": "xla", "tpu": "xla"}
WITHOUT_COMPILER = "xla"


def projection(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array | int,
    contracted: int,
    dtype: jnp.dtype,
    implementation: str,
) -> jax.Array:
    """Sums over the last `contracted` axes of x and of one layer of a stack.

    The product is one in the dtype of the stack, which may be wider than that of x; sums are float32. `xla` has a
    gradient, which is as large as the stack; `native` has none.

    Args:
        x: activations, [..., inputs].
        stack: [L, outputs..., inputs...], as checkpoints store them.
        layer: int32 scalar, which layer of the stack.
        contracted: how many axes the inputs are, static.
        dtype: of the result, static.
        implementation: a name from `IMPLEMENTATIONS`, static.

    Returns:
        [..., outputs...].
    """
    return IMPLEMENTATIONS[implementation].forward(x, stack, layer, contracted, jnp.dtype(dtype))
