"""Causal attention in C++ (`native.cc`), for CPUs: scores stay in the processor's caches; it has its own gradient."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels import compiled

PLATFORM, lacks, ONE_DEVICE = "cpu", compiled.lacks, True
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")


def forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale):
    """As `api.causal_attention`; also the log-sum-exp of every query's scores in base 2, float32 [B, H, T].

    Raises:
        ValueError: an input is not float32, bfloat16 or float16, or there is no compiler that accepts the source.
    """
    dtype = _dtype(query_BTHA, key_BMGA, value_BMGX)
    batch, length, heads, _ = query_BTHA.shape
    call = jax.ffi.ffi_call(
        compiled.register(_SOURCE, "moe_jax_causal_attention"),
        (
            jax.ShapeDtypeStruct((batch, length, heads, value_BMGX.shape[-1]), dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
    )
    operands = (x.astype(dtype) for x in (query_BTHA, key_BMGA, value_BMGX))
    places = (segments_BM.astype(jnp.int32), start_B.astype(jnp.int32))
    mixed_BTHX, log_sum_exp_BHT = call(*operands, *places, scale=np.float32(scale))
    return mixed_BTHX.astype(value_BMGX.dtype), log_sum_exp_BHT


def backward(
    query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, mixed_BTHX, log_sum_exp_BHT, mixed_grad_BTHX
):
    """The gradients for queries, keys and values."""
    inputs = (query_BTHA, key_BMGA, value_BMGX)
    dtype = _dtype(*inputs)
    call = jax.ffi.ffi_call(
        compiled.register(_SOURCE, "moe_jax_causal_attention_gradient"),
        tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in inputs),
    )
    grads = call(
        *(x.astype(dtype) for x in inputs),
        segments_BM.astype(jnp.int32),
        start_B.astype(jnp.int32),
        mixed_BTHX.astype(dtype),
        log_sum_exp_BHT,
        mixed_grad_BTHX.astype(dtype),
        scale=np.float32(scale),
    )
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, inputs))


def _dtype(*inputs):
    dtype = jnp.result_type(*inputs)
    if dtype not in map(jnp.dtype, ("float32", "bfloat16", "float16")):
        raise ValueError(f"causal_attention: expected float32, bfloat16 or float16, got {dtype}")
    return dtype
