"""Grouped matmul in C++ (`native.cc`), for CPUs: reads weights in place, once per 128 rows.

Its gradient is that of `blocked`, which is bound by arithmetic rather than by memory.
"""

import itertools
import math
import operator
import pathlib

import jax
import jax.numpy as jnp

from moe_jax.kernels import compiled, quantized
from moe_jax.kernels.grouped_matmul import blocked
from moe_jax.kernels.quantized import Quantized

PLATFORM, lacks, ONE_DEVICE = "cpu", compiled.lacks, True
EIGHT_BITS = quantized.DTYPES
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_ROWS = ("float32", "bfloat16", "float16")


def forward(rows_SD, weights_LEFD, group_sizes_E, layer, out_dtype=None):
    """As `api.grouped_matmul`; the output may also be float32.

    The stack may have several axes of outputs and of inputs, since a reshape before this call makes some versions of
    XLA copy the whole stack. It may lack the axis of experts if there is one expert.

    Raises:
        ValueError: rows and weights differ in dtype or depth, are not float32, bfloat16 or float16, or there is no
            compiler that accepts the source.
    """
    if isinstance(weights_LEFD, Quantized):
        return _quantized(rows_SD, weights_LEFD, group_sizes_E, layer)
    dtype = jnp.dtype(rows_SD.dtype)
    out_dtype = jnp.dtype(out_dtype or dtype)
    if weights_LEFD.dtype != dtype or dtype.name not in _ROWS:
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


def _quantized(rows_SD, weights_LEFD, group_sizes_E, layer):
    """Numbers in eight bits are converted as they are read; each block's sums are scaled in float32."""
    if rows_SD.dtype.name not in _ROWS or weights_LEFD.values.dtype.name not in EIGHT_BITS:
        raise ValueError(
            f"grouped_matmul: rows are {rows_SD.dtype}, weights {weights_LEFD.values.dtype}: expected rows of "
            f"{', '.join(_ROWS)}, and weights of {' or '.join(EIGHT_BITS)}"
        )
    if rows_SD.shape[1] != weights_LEFD.shape[3]:
        raise ValueError(f"grouped_matmul: rows of {rows_SD.shape[1]} numbers, but weights {weights_LEFD.shape}")
    out = jax.ShapeDtypeStruct((rows_SD.shape[0], weights_LEFD.shape[2]), rows_SD.dtype)
    call = jax.ffi.ffi_call(compiled.register(_SOURCE, "moe_jax_quantized_matmul"), out)
    sizes_E, layer = group_sizes_E.astype(jnp.int32), jnp.asarray(layer, jnp.int32)
    return call(rows_SD, weights_LEFD.values, weights_LEFD.scale, sizes_E, layer)


backward = blocked.backward
