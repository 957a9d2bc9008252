"""Attention against a cache as sums of products, into which XLA for GPUs fuses the slice of the cache.

A matrix product would first copy the layer. So would sums that XLA turns into products, or whose operands it transposes
first: the order of dimensions is stated, and values are added up in blocks of positions. Latents, which many heads
share, are multiplied by matrices.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from moe_jax.kernels.cached_attention import matmul

BLOCK = 256  # positions whose values are added up at once


def forward(query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`."""
    new, caches = (query_BHA, key_BGA, value_BGX), (key_LBMGA, value_LBMGX)
    settings = layer, position_B, scale, value_channels
    mixed_BHX, *caches = matmul.attend(*new, *map(_in_order, caches), *settings, _mix, _mix_latents)
    return mixed_BHX, *map(_in_order, caches)


def _in_order(x):
    """The same array, with its dimensions in the order of their letters in memory; None if it is None."""
    if x is None or jax.__version_info__ < (0, 11):  # which on a mesh would gather the array first
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale):
    query_BGQA, key_BMGA, value_BMGX = (x.astype(jnp.float32) for x in (query_BGQA, key_BMGA, value_BMGX))
    scaled_BGQA = query_BGQA * scale  # scaled afterwards, scores would be rounded once more
    score_BMGQ = (scaled_BGQA[:, None] * key_BMGA[:, :, :, None]).sum(axis=-1)
    score_BGQM = _in_order(jnp.moveaxis(score_BMGQ, 1, 3))  # of this order XLA makes one kernel of the softmax
    share_BGQM = _in_order(jax.nn.softmax(jnp.where(seen_BM[:, None, None], score_BGQM, -1e30), axis=-1))
    weighted_BMGQX = jnp.moveaxis(share_BGQM, 3, 1)[..., None] * value_BMGX[:, :, :, None]
    batch, length, *rest = weighted_BMGQX.shape
    in_blocks = weighted_BMGQX.reshape(batch, -1, math.gcd(length, BLOCK), *rest)
    return _in_order(in_blocks.sum(axis=2)).sum(axis=1)


def _mix_latents(query_BGQA, key_BMGA, seen_BM, scale, value_channels):
    """Mixes all channels: those of values would be copied first."""
    return matmul.mix(query_BGQA, key_BMGA, key_BMGA, seen_BM, scale)[..., :value_channels]
