"""Attention against a cache by matrix products, for TPUs.

There XLA reads a layer of the cache in place; where query heads share keys, and on a TPU7x, it copies the layer once.
Latents of another number of channels than a multiple of 128 would lie with positions innermost between calls, and be
copied whole at the start of each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CHANNELS = 128  # a cached latent has a multiple of these


def forward(query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`."""
    new = query_BHA, key_BGA, value_BGX
    return attend(*new, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels, mix, mix_latents)


def attend(
    query_BHA,
    key_BGA,
    value_BGX,
    key_LBMGA,
    value_LBMGX,
    layer,
    position_B,
    scale,
    value_channels,
    value_mix: Callable,
    latent_mix: Callable,
):
    """As `api.cached_attention`, by `mix`, or `mix_latents` where keys hold the values, or by other forms of them."""
    rows = jnp.arange(len(position_B))
    if value_LBMGX is None:  # the cache may have more channels, which are zero
        padding = (0, 0), (0, 0), (0, key_LBMGA.shape[-1] - key_BGA.shape[-1])
        query_BHA, key_BGA = jnp.pad(query_BHA, padding), jnp.pad(key_BGA, padding)

    def read(cache_LBMGA, new_BGA):
        cache_LBMGA = cache_LBMGA.at[layer, rows, position_B].set(new_BGA)
        return lax.dynamic_index_in_dim(cache_LBMGA, layer, 0, keepdims=False), cache_LBMGA

    key_BMGA, key_LBMGA = read(key_LBMGA, key_BGA)
    seen_BM = jnp.arange(key_BMGA.shape[1])[None, :] <= position_B[:, None]
    query_BGQA = query_BHA.reshape(len(query_BHA), key_BMGA.shape[2], -1, query_BHA.shape[-1])
    if value_LBMGX is None:
        mixed_BGQX = latent_mix(query_BGQA, key_BMGA, seen_BM, scale, value_channels)
    else:
        value_BMGX, value_LBMGX = read(value_LBMGX, value_BGX)
        mixed_BGQX = value_mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale)
    mixed_BHX = mixed_BGQX.reshape(*query_BHA.shape[:2], -1)
    return mixed_BHX.astype(query_BHA.dtype), key_LBMGA, value_LBMGX


def mix_latents(query_BGQA, key_BMGA, seen_BM, scale, value_channels):
    """`mix`, where the first channels of a key are its value."""
    return mix(query_BGQA, key_BMGA, key_BMGA[..., :value_channels], seen_BM, scale)


def mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale):
    """mixed_BGQX, float32: values in the shares of the softmax over seen positions."""
    precision = None
    if key_BMGA.dtype == jnp.float32:  # a TPU would round the operands; and scores round less if queries are scaled
        precision, query_BGQA, scale = lax.Precision.HIGHEST, query_BGQA.astype(jnp.float32) * scale, 1.0
    settings = {"precision": precision, "preferred_element_type": jnp.float32}
    score_BGQM = jnp.einsum("bgqa,bmga->bgqm", query_BGQA, key_BMGA, **settings)
    share_BGQM = jax.nn.softmax(jnp.where(seen_BM[:, None, None], score_BGQM * scale, -1e30), axis=-1)
    return jnp.einsum("bgqm,bmgx->bgqx", share_BGQM.astype(key_BMGA.dtype), value_BMGX, **settings)
