"""Weights stored in eight bits, with a float32 scale for each block of a matrix: the type, and how values become it.

A weight is its stored value times the scale of its block. Kernels multiply by values, which are exact in bfloat16, and
apply scales to values or to sums; no more than one expert's matrix is ever dequantised at once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FLOAT8, INT8 = "float8_e4m3fn", "int8"
DTYPES = (FLOAT8, INT8)
LARGEST = {FLOAT8: float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max), INT8: 127.0}  # of a stored value
NO_GRADIENT = (
    "the experts' weights are in eight bits, which have no gradient: expected model.expert_dtype=model, which "
    "dequantises them when they are loaded"
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
class Quantized:
    """A stack of matrices in eight bits, in place of the array.

    Blocks have one size, which divides the matrix: it is the ratio of the two shapes.

    Attributes:
        values: float8_e4m3fn or int8, [stacked.., outputs, inputs].
        scale: float32 [stacked.., blocks of outputs, blocks of inputs].
    """

    def __init__(self, values: Any, scale: Any):
        self.values, self.scale = values, scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def size(self) -> int:
        """Numbers of the weight."""
        return self.values.size

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs of a block."""
        return tuple(size // blocks for size, blocks in zip(self.values.shape[-2:], self.scale.shape[-2:]))


def is_quantized(weight: Any) -> bool:
    """Whether a weight is stored in eight bits."""
    return isinstance(weight, Quantized)


def holds_any(weights: Any) -> bool:
    """Whether some weight of a tree is stored in eight bits."""
    return any(map(is_quantized, jax.tree.leaves(weights, is_leaf=is_quantized)))


def dequantize(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Some matrices as an array: products of values and scales in float32, rounded once.

    Args:
        values: [.., outputs, inputs].
        scale: [.., blocks of outputs, blocks of inputs].
        dtype: of the result.
    """
    *stacked, outputs, inputs = values.shape
    down, across = scale.shape[-2:]
    in_blocks = values.astype(jnp.float32).reshape(*stacked, down, outputs // down, across, inputs // across)
    return (in_blocks * scale[..., :, None, :, None]).reshape(values.shape).astype(dtype)


def block_of(dtype: str, outputs: int, inputs: int) -> tuple[int, int]:
    """The block in which a matrix is quantised: DeepSeek-V3's for FP8, one output for int8."""
    return (128, 128) if dtype == FLOAT8 else (1, inputs)


def even_block(block: tuple[int, int], outputs: int, inputs: int) -> tuple[int, int]:
    """The largest block that divides a matrix and never spans two of the given ones."""
    return tuple(size if size <= one else math.gcd(size, one) for one, size in zip(block, (outputs, inputs)))


def quantize(matrix: np.ndarray, dtype: str, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix to eight bits: the largest number of each block becomes the largest stored value.

    Args:
        matrix: [outputs, inputs], finite.
        dtype: one of `DTYPES`.
        block: its outputs and inputs; the last ones may be smaller.

    Returns:
        values, and float32 scales of all blocks: 1 for zero blocks, not finite for those that are not.
    """
    largest_in_rows = np.maximum.reduceat(np.abs(matrix), np.arange(0, matrix.shape[1], block[1]), axis=1)
    largest = np.maximum.reduceat(largest_in_rows, np.arange(0, matrix.shape[0], block[0]), axis=0)
    scale = largest.astype(np.float32) / np.float32(LARGEST[dtype])
    scale = np.where(scale == 0, np.float32(1), scale)
    with np.errstate(invalid="ignore"):
        exact = matrix.astype(np.float32) / spread(scale, block, matrix.shape)
        exact = np.clip(exact, -LARGEST[dtype], LARGEST[dtype])
        values = np.rint(exact).astype(np.int8) if dtype == INT8 else exact.astype(ml_dtypes.float8_e4m3fn)
        return values, scale


def wide(matrix: Quantized) -> np.ndarray:
    """One matrix as float32, in NumPy."""
    values = np.asarray(matrix.values).astype(np.float32)
    return values * spread(np.asarray(matrix.scale), matrix.block, values.shape)


def spread(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, int], step: tuple[int, int] = (1, 1)):
    """The scales of blocks of size `step`, which lie within blocks of size `block` that may end within the matrix."""
    rows, columns = (np.arange(0, size, by) // one for size, by, one in zip(shape, step, block))
    return scale[rows[:, None], columns[None]]
