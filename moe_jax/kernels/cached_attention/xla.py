"""Attention against a cache in plain JAX with products written out, which suits CPUs."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.cached_attention.matmul import attend, mix_latents

_TERMS = 8  # parts of a sum, added one after another


def forward(query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`."""
    new = query_BHA, key_BGA, value_BGX
    return attend(*new, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels, _mix, mix_latents)


def _mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale):
    """Products written out, a few terms at a time, so that XLA reads the cache in place.

    Elsewhere than on a TPU, a matrix product would first copy and transpose the layer. In half precision the layer is
    sliced before a barrier: otherwise XLA would convert the caches of all layers to float32 and slice the result.
    """
    if key_BMGA.dtype != jnp.float32:
        key_BMGA, value_BMGX = lax.optimization_barrier((key_BMGA, value_BMGX))
    batch, memory, kv_heads, head_dim = key_BMGA.shape
    terms = math.gcd(head_dim, _TERMS)
    keys = key_BMGA.reshape(batch, memory, kv_heads, terms, -1)
    queries = query_BGQA.astype(jnp.float32).reshape(batch, 1, *query_BGQA.shape[1:3], terms, -1)
    sums = 0.0
    for term in range(terms):
        part = lax.dynamic_slice_in_dim(keys, term, 1, 3)
        sums = sums + queries[:, :, :, :, term] * part.astype(jnp.float32)
    score_BMGQ = lax.optimization_barrier(sums).sum(axis=-1) * scale
    share_BMGQ = jax.nn.softmax(jnp.where(seen_BM[:, :, None, None], score_BMGQ, -1e30), axis=1)

    terms = math.gcd(memory, _TERMS)
    values = value_BMGX.reshape(batch, -1, terms, kv_heads, 1, value_BMGX.shape[-1])
    shares = share_BMGQ.reshape(batch, -1, terms, *share_BMGQ.shape[2:], 1)
    sums = 0.0
    for term in range(terms):
        part = lax.dynamic_slice_in_dim(values, term, 1, 2)
        sums = sums + shares[:, :, term] * part[:, :, 0].astype(jnp.float32)
    return lax.optimization_barrier(sums).sum(axis=1)
