"""Weights in eight bits for tests of kernels, with the same weights from loops over every number."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe_jax.kernels.quantized import Quantized

LARGEST = {"float8_e4m3fn": 448, "int8": 127}


def random_weights(shape, dtype, block=None, seed=0):
    """A stack of random values with random scales, and as an array in float64.

    `block` divides the matrices; without it, int8 has a scale per output, and FP8 blocks of 8 x 8 or of all, if less.
    """
    random = np.random.default_rng(seed)
    outputs, inputs = shape[-2:]
    if block is None:
        block = (1, inputs) if dtype == "int8" else tuple(8 if size % 8 == 0 else size for size in (outputs, inputs))
    if dtype == "int8":
        values = random.integers(-127, 128, shape, np.int8)
    else:
        bits = random.integers(0, 256, shape, np.uint8)
        bits[(bits & 0x7F) == 0x7F] = 0  # NaN
        values = bits.view(ml_dtypes.float8_e4m3fn)
    scale = random.uniform(0.5, 2, (*shape[:-2], outputs // block[0], inputs // block[1])).astype(np.float32)
    scale /= LARGEST[dtype]
    return Quantized(jnp.asarray(values), jnp.asarray(scale)), plain(values, scale, block)


def plain(values, scale, block):
    """Every weight, one by one: its value times the scale of its block."""
    wide = np.empty(values.shape, np.float64)
    for place in np.ndindex(values.shape[-2:]):
        at = (..., place[0] // block[0], place[1] // block[1])
        wide[(..., *place)] = values[(..., *place)].astype(np.float64) * scale[at]
    return wide
