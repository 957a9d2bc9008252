"""The product of a few rows on a Hopper GPU: a grouped matmul with one expert for all rows.

XLA's products of 2 rows or more copy the layer out of the stack, which moves three times its bytes. Left to XLA are
products of a single row, into which it fuses the slice; of more than 64 rows, beside which the copy is small; with
float32 results; and with matrices that are neither bfloat16 nor float16, or no multiples of 64 by 64.
"""

import math

import jax.numpy as jnp

from moe_jax.config.architecture import Architecture
from moe_jax.kernels.grouped_matmul import pallas_gpu as grouped_matmul
from moe_jax.kernels.projection import xla

PLATFORM, ONE_DEVICE = grouped_matmul.PLATFORM, True
MOST_ROWS = 64
TILES = grouped_matmul.Tiles(64, 64, 128, 6)  # narrow: a projection has a few thousand outputs for all cores


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why no projection of a model runs in the kernel on this device; "" if one does."""
    return grouped_matmul.lacks_widths((architecture.decoder.d_model,) * 2, dtype)


def forward(x, stack, layer, contracted, dtype):
    """As `api.projection`."""
    outputs, inputs = stack.shape[1 : stack.ndim - contracted], stack.shape[stack.ndim - contracted :]
    rows = x.reshape(-1, math.prod(inputs))
    widths = math.prod(outputs), math.prod(inputs)
    few = 1 < rows.shape[0] <= MOST_ROWS
    if not few or dtype == jnp.float32 or grouped_matmul.lacks_widths(widths, str(stack.dtype)):
        return xla.forward(x, stack, layer, contracted, dtype)
    all_rows = jnp.array([rows.shape[0]], jnp.int32)
    experts_LEFD = stack.reshape(len(stack), 1, *widths)
    out = grouped_matmul.forward(rows.astype(stack.dtype), experts_LEFD, all_rows, layer, tiles=TILES)
    return out.reshape(*x.shape[: x.ndim - contracted], *outputs).astype(dtype)
