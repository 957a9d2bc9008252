"""A product with one layer's matrix out of the stack of all layers: the contract and the implementations.

XLA copies the layer out of the stack before its dot. With few rows, that copy takes most of the time; `native` and
`pallas_gpu` read the matrix in place.
"""

import jax
import jax.numpy as jnp

from moe_jax.kernels.projection import native, pallas_gpu, xla

IMPLEMENTATIONS = {"native": native, "pallas_gpu": pallas_gpu, "xla": xla}
BY_PLATFORM = {"cpu": ("native", "xla"), "gpu": ("pallas_gpu", "xla"), "tpu": ("xla",)}  # the best first


def projection(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array | int,
    contracted: int,
    dtype: jnp.dtype,
    implementation: str,
) -> jax.Array:
    """Sums over the last `contracted` axes of x and of one layer of a stack.

    x is converted to the dtype of the stack; sums are float32. `xla` has a gradient as large as the stack, the
    others have none.

    Args:
        x: activations, [..., inputs].
        stack: [L, outputs..., inputs...], as checkpoints store them.
        layer: int32 scalar, which layer of the stack.
        contracted: number of input axes, static.
        dtype: the dtype of the result, static.
        implementation: a name from `IMPLEMENTATIONS`, static.

    Returns:
        [..., outputs...].
    """
    return IMPLEMENTATIONS[implementation].forward(x, stack, layer, contracted, jnp.dtype(dtype))
