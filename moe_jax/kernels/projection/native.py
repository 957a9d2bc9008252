"""The product in C++, for CPUs."""

import jax.numpy as jnp

from moe_jax.kernels import compiled
from moe_jax.kernels.grouped_matmul import native as grouped_matmul
from moe_jax.kernels.projection import flat

PLATFORM, lacks, ONE_DEVICE = "cpu", compiled.lacks, True


def forward(x, stack, layer, contracted, dtype):
    """As `api.projection`."""
    rows_SD, stack_LEFD, size_E, shape = flat.grouped(x, stack, contracted)
    wider = dtype if dtype == jnp.float32 else None
    return grouped_matmul.forward(rows_SD, stack_LEFD, size_E, layer, wider).reshape(shape).astype(dtype)
