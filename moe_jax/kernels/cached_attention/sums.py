"""Attention against a cache as sums of products, into which XLA for GPUs fuses the slice of the cache.

A matrix product would first copy the layer.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from moe_jax.kernels.cached_attention.matmul import attend


def forward(query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`."""
    new, caches = (query_BHA, key_BGA, value_BGX), (key_LBMGA, value_LBMGX)
    mixed_BHX, *caches = attend(*new, *map(_as_named, caches), layer, position_B, scale, value_channels, _mix)
    return mixed_BHX, *map(_as_named, caches)


def _as_named(cache_LBMGA):
    """The cache in the order of its letters. XLA might prefer positions innermost, and copy it whole in every call."""
    return None if cache_LBMGA is None else with_layout_constraint(cache_LBMGA, Layout((0, 1, 2, 3, 4)))


def _mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale):
    query_BGQA, key_BMGA, value_BMGX = (x.astype(jnp.float32) for x in (query_BGQA, key_BMGA, value_BMGX))
    scaled_BGQA = query_BGQA * scale  # scaled afterwards, scores would be rounded once more
    score_BMGQ = (scaled_BGQA[:, None] * key_BMGA[:, :, :, None]).sum(axis=-1)
    share_BMGQ = jax.nn.softmax(jnp.where(seen_BM[:, :, None, None], score_BMGQ, -1e30), axis=1)
    return (share_BMGQ[..., None] * value_BMGX[:, :, :, None]).sum(axis=1)
