"""Attention against a cache in C++ (`native.cc`), for CPUs: reads the cache in place, in any dtype."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels import compiled

PLATFORM, lacks, ONE_DEVICE = "cpu", compiled.lacks, True
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")


def forward(query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`."""
    kept_in_keys = value_LBMGX is None
    if kept_in_keys:
        value_BGX, value_LBMGX = key_BGA[..., :0], key_LBMGA[..., :0]
    mixed_BHX = jax.ShapeDtypeStruct((*query_BHA.shape[:2], value_channels), jnp.float32)
    call = jax.ffi.ffi_call(
        compiled.register(_SOURCE, "moe_jax_cached_attention"),
        (mixed_BHX, *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (key_LBMGA, value_LBMGX))),
        input_output_aliases={3: 1, 4: 2},
    )
    mixed_BHX, key_LBMGA, value_LBMGX = call(
        query_BHA.astype(jnp.float32),
        key_BGA.astype(key_LBMGA.dtype),
        value_BGX.astype(value_LBMGX.dtype),
        key_LBMGA,
        value_LBMGX,
        jnp.asarray(layer, jnp.int32),
        position_B.astype(jnp.int32),
        scale=np.float32(scale),
    )
    return mixed_BHX.astype(query_BHA.dtype), key_LBMGA, None if kept_in_keys else value_LBMGX
