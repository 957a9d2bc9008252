"""Weights in eight bits in the kernel of `pallas_tpu`: which blocks it takes, and how their sums are scaled.

A part of a matrix becomes the dtype of the rows in vector memory, which rounds nothing, and is multiplied; each block's
sums are scaled in float32. Scales per output are a vector beside the block of weights; those of blocks of 128 numbers
and more are scalars.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels.quantized import Quantized

_LANES = 128
_DEPTHS = (512, 256, 128)  # numbers along a product that are converted at once


def lacks(block: tuple[int, int], outputs: int, inputs: int) -> str:
    """Why the kernel cannot run with this size of blocks that share a scale; "" if it can."""
    if block == (1, inputs) or all(
        one == size or one % _LANES == 0 for one, size in zip(block, (outputs, inputs), strict=True)
    ):
        return ""
    return (
        f"takes a scale per output, or per block of whole rows and columns or of multiples of {_LANES} of them, not "
        f"{block[0]} x {block[1]} of {outputs} x {inputs}"
    )


def _per_output(weights: Quantized) -> bool:
    return weights.block == (1, weights.shape[-1])


def operand(weights_LEIFD: Quantized, layer: jax.Array, columns: int) -> tuple[jax.Array, pl.BlockSpec]:
    """The scales of one layer as an operand, and the part that a step reads.

    They are sliced out of the stack, which is little: XLA would copy those of all layers into another layout, or into
    vector memory.

    Args:
        weights_LEIFD: [L, E, 1 or 2, F, D].
        layer: int32 scalar.
        columns: outputs of a block of weights.
    """
    scale_EIFD = lax.dynamic_index_in_dim(weights_LEIFD.scale, layer, keepdims=False)
    num_experts, num_matrices, down, across = scale_EIFD.shape

    def of_columns(column, visit, layer, expert_T, *_):  # of its expert, for the columns of this pass
        return expert_T[visit], 0, 0, column

    def of_expert(column, visit, layer, expert_T, *_):  # all of its expert
        return expert_T[visit], 0, 0, 0

    if _per_output(weights_LEIFD):
        as_rows = scale_EIFD.reshape(num_experts, num_matrices, 1, down)
        return as_rows, pl.BlockSpec((None, num_matrices, 1, columns), of_columns)
    return scale_EIFD, pl.BlockSpec((None, num_matrices, down, across), of_expert, memory_space=pltpu.SMEM)


def product_of(weights_LEIFD: Quantized, columns: int, dot):
    """A function (rows, weights, scale, at, part, matrix) of references: float32 sums of some rows and columns.

    Args:
        weights_LEIFD: of which only shapes are read.
        columns: outputs of a block of weights.
        dot: the product of two arrays along given axes.
    """
    outputs, inputs = weights_LEIFD.shape[-2:]
    block_outputs, block_inputs = weights_LEIFD.block
    depth = next((size for size in _DEPTHS if math.gcd(size, block_inputs) == size), block_inputs)
    blocks_down = outputs // block_outputs

    def multiply(rows, weights, scale, at, part, matrix):
        def along(begin, size):
            wide = weights[matrix, part, pl.ds(begin, size)].astype(rows.dtype)
            return dot(rows[at, pl.ds(begin, size)], wide, ((1,), (1,)))

        def of_block(across, _):
            first = pl.multiple_of(across * block_inputs, block_inputs)
            sums = along(first, depth)
            for number in range(1, block_inputs // depth):
                sums = sums + along(first + number * depth, depth)
            return sums

        if _per_output(weights_LEIFD):

            def add(number, sums):
                return sums + along(pl.multiple_of(number * depth, depth), depth)

            sums = lax.fori_loop(1, inputs // depth, add, along(0, depth))
            return sums * scale[matrix, :, part]

        first_output = pl.program_id(0) * columns + part.start
        width = math.gcd(part.size, block_outputs)

        def scales(across):
            each = []
            for first in range(0, part.size, width):
                down = lax.min(lax.div(first_output + first, jnp.int32(block_outputs)), jnp.int32(blocks_down - 1))
                each.append(jnp.full((1, width), scale[matrix, down, across], jnp.float32))
            return each[0] if len(each) == 1 else jnp.concatenate(each, axis=1)

        def add_block(across, sums):
            return sums + of_block(across, None) * scales(across)

        return lax.fori_loop(1, inputs // block_inputs, add_block, of_block(0, None) * scales(0))

    return multiply
