"""A model of any shape with random weights, to measure speed without a checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import memory
from moe_jax.config.architecture import Architecture
from moe_jax.kernels import quantized
from moe_jax.kernels.quantized import Quantized
from moe_jax.model import decoder, parameters


def random_params(architecture: Architecture, dtype: jnp.dtype, seed: int, expert_dtype: str = "") -> decoder.Params:
    """Uniform noise, scaled to keep activations near one; norms are one and biases zero.

    The noise is a hash of each weight's index, which takes no memory beside the weights. JAX's own generators take
    half a minute for a billion numbers on 2 cores.

    Args:
        architecture: the model's architecture.
        dtype: the dtype of every parameter.
        seed: the seed of the noise.
        expert_dtype: of the routed experts if they are to be in eight bits, with one scale for all.

    Raises:
        ValueError: the model does not fit in the memory that is available.
    """
    narrow = parameters.count(architecture, parameters.is_routed) if expert_dtype else 0
    needed_bytes = (parameters.count(architecture) - narrow) * jnp.dtype(dtype).itemsize + narrow
    memory.require("the model", needed_bytes, memory.device_bytes(), "a smaller decoder.num_layers or model.dtype")
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameters.shapes(architecture))
    deviation = architecture.decoder.d_model**-0.5
    params = []
    for number, (path, leaf) in enumerate(leaves):
        parameter, salt = parameters.find_key(path), np.uint32((seed * len(leaves) + number) % 2**32)
        if parameter.kind is not parameters.Matrix:
            params.append(jnp.full(leaf.shape, parameter.kind is parameters.Norm, dtype))
        elif expert_dtype and parameters.is_routed(parameter):
            params.append(_in_eight_bits(salt, deviation, leaf.shape, expert_dtype))
        else:
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


def _in_eight_bits(salt: jax.Array, deviation: float, shape: tuple[int, ...], dtype: str) -> Quantized:
    """Noise up to the largest stored value, with scales that give it the standard deviation."""
    largest, matrix = quantized.LARGEST[dtype], shape[-2:]
    values = _noise(salt, largest / 3**0.5, shape=shape, dtype=jnp.dtype(dtype)).block_until_ready()
    block = quantized.even_block(quantized.block_of(dtype, *matrix), *matrix)
    blocks = (size // one for size, one in zip(matrix, block))
    return Quantized(values, jnp.full((*shape[:-2], *blocks), 3**0.5 * deviation / largest, jnp.float32))


def _mixed(bits: jax.Array) -> jax.Array:
    """A one-to-one hash from 32 bits to 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))
