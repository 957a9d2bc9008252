"""A model of any shape with random weights, to measure speed without a checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import memory
from moe_jax.config.architecture import Architecture
from moe_jax.model import decoder, parameters


def random_params(architecture: Architecture, dtype: jnp.dtype, seed: int) -> decoder.Params:
    """Uniform noise, scaled to keep activations near one; norms are one and biases zero.

    The noise is a hash of each weight's index, which takes no memory beside the weights. JAX's own generators take
    half a minute for a billion numbers on 2 cores.

    Args:
        architecture: the model's architecture.
        dtype: the dtype of every parameter.
        seed: the seed of the noise.

    Raises:
        ValueError: the model does not fit in the memory that is available.
    """
    needed_bytes = parameters.count(architecture) * jnp.dtype(dtype).itemsize
    memory.require("the model", needed_bytes, memory.device_bytes(), "a smaller decoder.num_layers or model.dtype")
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameters.shapes(architecture))
    deviation = architecture.decoder.d_model**-0.5
    params = []
    for number, (path, leaf) in enumerate(leaves):
        kind = parameters.find_key(path).kind
        if kind is not parameters.Matrix:
            params.append(jnp.full(leaf.shape, kind is parameters.Norm, dtype))
        else:
            salt = np.uint32((seed * len(leaves) + number) % 2**32)
            params.append(_noise(salt, deviation, shape=leaf.shape, dtype=jnp.dtype(dtype)).block_until_ready())
    return jax.tree.unflatten(tree, params)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _noise(salt: jax.Array, deviation: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform, with mean zero and the given standard deviation."""
    place = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        place = place + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    mixed = _mixed(place + _mixed(salt + np.uint32(1)))
    return ((mixed.astype(jnp.float32) * 2.0**-31 - 1.0) * (3**0.5 * deviation)).astype(dtype)


def _mixed(bits: jax.Array) -> jax.Array:
    """A one-to-one hash from 32 bits to 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))
