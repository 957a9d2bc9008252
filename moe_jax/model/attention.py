"""Grouped-query attention: whole sequences, and against a cache, one position of every row or many.

Every kind of attention is a module with a function `heads` (projections, norms and rotation), whose result mixes
positions: `causal` over whole sequences; `extend` and `step` against a cache, to which they add them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.architecture import AttentionConfig
from moe_jax.kernels.cached_attention.api import cached_attention
from moe_jax.kernels.causal_attention.api import causal_attention
from moe_jax.model import rope
from moe_jax.model.layers import Stacked, one_layer, project, rms_norm

OUTPUT = "output_DHA"  # the weight that projects mixed heads back


class Kept(NamedTuple):
    """What one layer adds to the cache."""

    key_BTGA: jax.Array
    value_BTGX: jax.Array | None


class Cache(NamedTuple):
    """What attention keeps of the positions seen so far, all layers in order."""

    key_LBMGA: jax.Array
    value_LBMGX: jax.Array | None  # None where the keys hold the values

    def opened(self, kept: Kept, layer: jax.Array | int) -> "Cache":
        """With the first positions of every row in one layer."""

        def write(all_layers, new):
            return lax.dynamic_update_slice(all_layers, new[None], (layer, 0, 0, 0, 0))

        return Cache(*jax.tree.map(write, tuple(self), tuple(kept)))

    def extended(self, kept: Kept, layer: jax.Array | int, start_B: jax.Array) -> "Cache":
        """With the positions from `start_B` on in one layer: row after row, since XLA's scatter on a CPU is slow."""

        def write(all_layers, new):
            def write_row(row, all_layers):
                of_row = lax.dynamic_slice_in_dim(new, row, 1)[None]
                return lax.dynamic_update_slice(all_layers, of_row, (layer, row, start_B[row], 0, 0))

            return lax.fori_loop(0, len(new), write_row, all_layers)

        return Cache(*jax.tree.map(write, tuple(self), tuple(kept)))


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys and values, normed and rotated."""

    query_BTHA: jax.Array
    key_BTGA: jax.Array
    value_BTGX: jax.Array
    scale: float  # of the scores

    @property
    def kept(self) -> Kept:
        """What later positions will read."""
        return Kept(self.key_BTGA, self.value_BTGX)

    def causal(self, segments_BT: jax.Array, implementation: str) -> jax.Array:
        """Mixes positions of whole sequences: mixed_BTHX, see `causal_attention`."""
        start_B = jnp.zeros(len(segments_BT), jnp.int32)
        return causal_attention(
            self.query_BTHA, self.key_BTGA, self.value_BTGX, segments_BT, start_B, self.scale, implementation
        )

    def extend(
        self, cache: Cache, layer: jax.Array | int, start_B: jax.Array, implementation: str
    ) -> tuple[jax.Array, Cache]:
        """Adds several positions of every row to the cache and mixes what each sees there: itself and all before it.

        Args:
            cache: of all layers.
            layer: which of them.
            start_B: int32, the place of the first in the cache, in which there is room for all.
            implementation: of `causal_attention`.

        Returns:
            mixed_BTHX and the cache.
        """
        cache = cache.extended(self.kept, layer, start_B)
        key_BMGA, value_BMGX = (one_layer(all_layers, layer) for all_layers in cache)
        places = jnp.ones(key_BMGA.shape[:2], jnp.int32), start_B
        mixed_BTHX = causal_attention(self.query_BTHA, key_BMGA, value_BMGX, *places, self.scale, implementation)
        return mixed_BTHX, cache

    def step(
        self, cache: Cache, layer: jax.Array | int, position_B: jax.Array, implementation: str
    ) -> tuple[jax.Array, Cache]:
        """Adds the one position of every row to the cache and mixes what it sees there, see `cached_attention`.

        Args:
            cache: of all layers.
            layer: which of them.
            position_B: int32, the place in the cache.
            implementation: of `cached_attention`.

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
    """Heads that a cache holds of every position, and the channels of each one's key and value."""
    return attention.num_kv_heads, attention.head_dim, attention.head_dim


def heads(
    x_BTD: jax.Array,
    weights: dict[str, jax.Array | Stacked],
    turn: tuple[jax.Array, jax.Array],
    attention: AttentionConfig,
    norm_eps: float,
) -> Heads:
    """Projects to heads.

    Args:
        x_BTD: normed activations.
        weights: one layer of attention's, names without the leading L.
        turn: cosines and sines of the positions.
        attention: the section of the configuration.
        norm_eps: of the query and key norms.
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
    query_BTHA, key_BTGA = (rope.rotate(x, turn, attention.rope_interleaved) for x in (query_BTHA, key_BTGA))
    return Heads(query_BTHA, key_BTGA, value_BTGA, rope.score_scale(attention, attention.head_dim))


def _add(x_BTHA: jax.Array, bias_HA: jax.Array) -> jax.Array:
    return (x_BTHA + bias_HA[None, None]).astype(x_BTHA.dtype)


def _norm_of_all(x_BTHA: jax.Array, scale_HA: jax.Array, eps: float) -> jax.Array:
    together = rms_norm(x_BTHA.reshape(*x_BTHA.shape[:2], -1), scale_HA.reshape(-1), eps)
    return together.reshape(x_BTHA.shape)
