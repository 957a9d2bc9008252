"""The product in C++, for CPUs: a grouped matmul with one expert for all rows."""

import math

import jax.numpy as jnp

from moe_jax.kernels import compiled
from moe_jax.kernels.grouped_matmul import native as grouped_matmul

PLATFORM, lacks, ONE_DEVICE = "cpu", compiled.lacks, True


def forward(x, stack, layer, contracted, dtype):
    """As `api.projection`."""
    outputs, inputs = stack.shape[1 : stack.ndim - contracted], stack.shape[stack.ndim - contracted :]
    rows = x.reshape(-1, math.prod(inputs)).astype(stack.dtype)
    all_rows = jnp.array([rows.shape[0]], jnp.int32)
    wider = dtype if dtype == jnp.float32 else None
    out = grouped_matmul.forward(rows, stack, all_rows, layer, wider)
    return out.reshape(*x.shape[: x.ndim - contracted], *outputs).astype(dtype)
