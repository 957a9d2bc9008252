"""Grouped-query attention over whole sequences, or over a cache with one or several new positions per row.

Every kind of attention is a module with a function `heads`, which projects, norms and rotates. The result mixes
positions: `causal` over whole sequences; `extend` (several positions) and `step` (one) add to a cache and read it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.architecture import AttentionConfig
from moe_jax.kernels.cached_attention.api import cached_attention
from moe_jax.model import rope
from moe_jax.model.layers import Stacked, one_layer, project, rms_norm

OUTPUT = "output_DHA"  # the output projection


# `causal_attention` of one implementation on one mesh: (query, key, value, segments, start, scale, prefixes=) -> mixed
Mix = Callable[..., jax.Array]


class Kept(NamedTuple):
    """What one layer adds to the cache."""

    key_BTGA: jax.Array
    value_BTGX: jax.Array | None


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, all layers in order."""

    key_LBMGA: jax.Array
    value_LBMGX: jax.Array | None  # None where keys contain the values

    def opened(self, kept: Kept, layer: jax.Array | int) -> "Cache":
        """The cache with one layer's new keys and values written from position 0 of every row."""

        def write(all_layers, new):
            return lax.dynamic_update_slice(all_layers, new[None], (layer, 0, 0, 0, 0))

        return Cache(*jax.tree.map(write, tuple(self), tuple(kept)))

    def extended(self, kept: Kept, layer: jax.Array | int, start_B: jax.Array) -> "Cache":
        """The cache with one layer's new keys and values written from `start_B` on.

        Writes row by row, since XLA's scatter is slow on a CPU.
        """

        def write(all_layers, new):
            def write_row(row, all_layers):
                new_row = lax.dynamic_slice_in_dim(new, row, 1)[None]
                return lax.dynamic_update_slice(all_layers, new_row, (layer, row, start_B[row], 0, 0))

            return lax.fori_loop(0, len(new), write_row, all_layers)

        return Cache(*jax.tree.map(write, tuple(self), tuple(kept)))


@dataclasses.dataclass(frozen=True)
class GroupedHeads:
    """Queries, keys and values, normed and rotated."""

    query_BTHA: jax.Array
    key_BTGA: jax.Array
    value_BTGX: jax.Array
    scale: float  # what scores are multiplied by

    @property
    def kept(self) -> Kept:
        """The keys and values that go into the cache."""
        return Kept(self.key_BTGA, self.value_BTGX)

    def causal(self, segments_BT: jax.Array | None, mix: Mix, *, prefixes: bool) -> jax.Array:
        """Mixes positions of whole sequences: mixed_BTHX, see `causal_attention`."""
        inputs = (self.query_BTHA, self.key_BTGA, self.value_BTGX)
        start_B = jnp.zeros(len(self.query_BTHA), jnp.int32)
        return mix(*inputs, segments_BT, start_B, self.scale, prefixes=prefixes)

    def extend(self, cache: Cache, layer: jax.Array | int, start_B: jax.Array, mix: Mix) -> tuple[jax.Array, Cache]:
        """Adds several positions of every row to the cache; each attends to itself and all earlier ones.

        Args:
            cache: the cache of all layers.
            layer: index into the cache.
            start_B: int32, where the first new position goes; the cache must have room for all.
            mix: `causal_attention`, see `Mix`.

        Returns:
            mixed_BTHX and the cache.
        """
        cache = cache.extended(self.kept, layer, start_B)
        key_BMGA, value_BMGX = (one_layer(all_layers, layer) for all_layers in cache)
        inputs = (self.query_BTHA, key_BMGA, value_BMGX)
        mixed_BTHX = mix(*inputs, None, start_B, self.scale, prefixes=False)
        return mixed_BTHX, cache

    def step(
        self, cache: Cache, layer: jax.Array | int, position_B: jax.Array, implementation: str
    ) -> tuple[jax.Array, Cache]:
        """Adds one position of every row to the cache and attends over the cache, see `cached_attention`.

        Args:
            cache: the cache of all layers.
            layer: index into the cache.
            position_B: int32, where the new position goes.
            implementation: the implementation of `cached_attention`.

        Returns:
            mixed_BTHX and the cache.
        """
        mixed_BHX, *extended = cached_attention(
            self.query_BTHA[:, 0],
            self.key_BTGA[:, 0],
            self.value_BTGX[:, 0],
            *cache,
            layer,
            position_B,
            scale=self.scale,
            value_channels=self.value_BTGX.shape[-1],
            implementation=implementation,
        )
        return mixed_BHX[:, None], Cache(*extended)


def cached_widths(attention: AttentionConfig) -> tuple[int, int, int]:
    """What a cache holds per position: number of heads, channels of a key, channels of a value."""
    return attention.num_kv_heads, attention.head_dim, attention.head_dim


def heads(
    x_BTD: jax.Array,
    weights: dict[str, jax.Array | Stacked],
    cos_sin: tuple[jax.Array, jax.Array],
    attention: AttentionConfig,
    norm_eps: float,
) -> GroupedHeads:
    """Projects to queries, keys and values, norms and rotates them.

    Args:
        x_BTD: normed activations.
        weights: the attention weights of one layer, names without the leading L.
        cos_sin: cosines and sines of the rotary angles.
        attention: the attention settings.
        norm_eps: epsilon of the query and key norms.
    """
    query_BTHA = project(x_BTD, weights["query_HAD"])
    key_BTGA = project(x_BTD, weights["key_GAD"])
    value_BTGA = project(x_BTD, weights["value_GAD"])
    if attention.bias:
        query_BTHA = _add(query_BTHA, weights["query_bias_HA"])
        key_BTGA = _add(key_BTGA, weights["key_bias_GA"])
        value_BTGA = _add(value_BTGA, weights["value_bias_GA"])
    if attention.qk_norm and attention.qk_norm_span == "all":
        query_BTHA = _norm_of_all(query_BTHA, weights["query_norm_HA"], norm_eps)
        key_BTGA = _norm_of_all(key_BTGA, weights["key_norm_GA"], norm_eps)
    elif attention.qk_norm:
        query_BTHA = rms_norm(query_BTHA, weights["query_norm_A"], norm_eps)
        key_BTGA = rms_norm(key_BTGA, weights["key_norm_A"], norm_eps)
    if attention.clip_qkv:
        bound = attention.clip_qkv
        query_BTHA, key_BTGA, value_BTGA = (jnp.clip(x, -bound, bound) for x in (query_BTHA, key_BTGA, value_BTGA))
    query_BTHA, key_BTGA = (rope.rotate(x, cos_sin, attention.rope_interleaved) for x in (query_BTHA, key_BTGA))
    return GroupedHeads(query_BTHA, key_BTGA, value_BTGA, rope.score_scale(attention, attention.head_dim))


def _add(x_BTHA: jax.Array, bias_HA: jax.Array) -> jax.Array:
    return (x_BTHA + bias_HA[None, None]).astype(x_BTHA.dtype)


def _norm_of_all(x_BTHA: jax.Array, scale_HA: jax.Array, eps: float) -> jax.Array:
    normed = rms_norm(x_BTHA.reshape(*x_BTHA.shape[:2], -1), scale_HA.reshape(-1), eps)
    return normed.reshape(x_BTHA.shape)
