"""The product of a few rows on a Hopper GPU.

XLA's products of 2 rows or more copy the layer out of the stack, which moves three times its bytes. Left to XLA are
products of a single row, into which it fuses the slice; of more than 64 rows, beside which the copy is small; with
float32 results; and with matrices that are neither bfloat16 nor float16, or no multiples of 64 by 64.
"""

import jax.numpy as jnp

from moe_jax.config.architecture import Architecture
from moe_jax.kernels.grouped_matmul import pallas_gpu as grouped_matmul
from moe_jax.kernels.projection import flat, xla

PLATFORM, ONE_DEVICE = grouped_matmul.PLATFORM, True
MOST_ROWS = 64
TILES = grouped_matmul.Tiles(64, 64, 128, 6)  # narrow: a projection has a few thousand outputs for all cores


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why products with matrices of the model's width do not run in the kernel on this device; "" if they do."""
    return grouped_matmul.lacks_widths((architecture.decoder.d_model,) * 2, dtype)


def forward(x, stack, layer, contracted, dtype):
    """As `api.projection`."""
    rows_SD, stack_LEFD, size_E, shape = flat.grouped(x, stack, contracted)
    few = 1 < len(rows_SD) <= MOST_ROWS
    if not few or dtype == jnp.float32 or grouped_matmul.lacks_widths(stack_LEFD.shape[-2:], str(stack.dtype)):
        return xla.forward(x, stack, layer, contracted, dtype)
    out_SF = grouped_matmul.forward(rows_SD, stack_LEFD, size_E, layer, tiles=TILES)
    return out_SF.reshape(shape).astype(dtype)
