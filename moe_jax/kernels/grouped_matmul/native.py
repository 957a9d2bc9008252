"""Grouped matmul in C++ (`native.cc`), for CPUs: reads weights in place, once per 128 rows.

Its gradient is that of `blocked`, which is bound by arithmetic rather than by memory.
"""

import itertools
import math
import operator
import pathlib

import jax
import jax.numpy as jnp

from moe_jax.kernels import compiled
from moe_jax.kernels.grouped_matmul import blocked

PLATFORM, lacks, ONE_DEVICE = "cpu", compiled.lacks, True
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")


def forward(rows_SD, weights_LEFD, group_sizes_E, layer, out_dtype=None):
    """As `api.grouped_matmul`; the output may also be float32.

    The stack may have several axes of outputs and of inputs, since a reshape before this call makes some versions of
    XLA copy the whole stack. It may lack the axis of experts if there is one expert.

    Raises:
        ValueError: rows and weights differ in dtype or depth, are not float32, bfloat16 or float16, or there is no
            compiler that accepts the source.
    """
    dtype = jnp.dtype(rows_SD.dtype)
    out_dtype = jnp.dtype(out_dtype or dtype)
    if weights_LEFD.dtype != dtype or dtype not in map(jnp.dtype, ("float32", "bfloat16", "float16")):
        raise ValueError(
            f"grouped_matmul: rows are {dtype}, weights {weights_LEFD.dtype}: expected float32, bfloat16 or float16"
        )
    num_rows, depth = rows_SD.shape
    if depth not in itertools.accumulate(reversed(weights_LEFD.shape), operator.mul):
        raise ValueError(f"grouped_matmul: rows of {depth} numbers, but weights of shape {weights_LEFD.shape}")
    num_columns = math.prod(weights_LEFD.shape) // (weights_LEFD.shape[0] * len(group_sizes_E) * depth)
    call = jax.ffi.ffi_call(
        compiled.register(_SOURCE, "moe_jax_grouped_matmul"), jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype)
    )
    return call(rows_SD, weights_LEFD, group_sizes_E.astype(jnp.int32), jnp.asarray(layer, jnp.int32))


backward = blocked.backward
