"""Attention against a cache in plain JAX: as XLA reads the cache in place on a CPU, and what its other forms share."""

import math

import jax
import jax.numpy as jnp
from jax import lax

_TERMS = 8  # parts of a sum, added one after another


def attend(mix, query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`; where keys do not hold the values, `mix` gives the result.

    It takes query_BGQA (Q query heads read a key head), key_BMGA, value_BMGX, the positions that each row sees and the
    scale, and returns float32 mixed_BGQX.
    """
    rows = jnp.arange(len(position_B))

    def read(cache_LBMGA, new_BGA):
        cache_LBMGA = cache_LBMGA.at[layer, rows, position_B].set(new_BGA)
        return lax.dynamic_index_in_dim(cache_LBMGA, layer, 0, keepdims=False), cache_LBMGA

    key_BMGA, key_LBMGA = read(key_LBMGA, key_BGA)
    seen_BM = jnp.arange(key_BMGA.shape[1])[None, :] <= position_B[:, None]
    query_BGQA = query_BHA.reshape(len(query_BHA), key_BMGA.shape[2], -1, query_BHA.shape[-1])
    if value_LBMGX is None:
        mixed_BGQX = _mix_latents(query_BGQA, key_BMGA, seen_BM, scale, value_channels)
    else:
        value_BMGX, value_LBMGX = read(value_LBMGX, value_BGX)
        mixed_BGQX = mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale)
    mixed_BHX = mixed_BGQX.reshape(*query_BHA.shape[:2], -1)
    return mixed_BHX.astype(query_BHA.dtype), key_LBMGA, value_LBMGX


def forward(*arguments):
    """As `api.cached_attention`."""
    return attend(_mix, *arguments)


def _mix_latents(query_BGQA, key_BMGA, seen_BM, scale, value_channels):
    """Matrix products: many query heads read one key head."""
    score_BGQM = jnp.einsum("bgqa,bmga->bgqm", query_BGQA, key_BMGA, preferred_element_type=jnp.float32)
    share_BGQM = jax.nn.softmax(jnp.where(seen_BM[:, None, None], score_BGQM * scale, -1e30), axis=-1)
    return jnp.einsum("bgqm,bmgx->bgqx", share_BGQM.astype(key_BMGA.dtype), key_BMGA[..., :value_channels])


def _mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale):
    """Products written out, a few terms at a time, so that XLA reads the cache in place.

    A matrix product would first copy and transpose the layer. In half precision the layer is sliced before a barrier:
    otherwise XLA would convert the caches of all layers to float32 and slice the result.
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
