"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made of a narrow latent.

With many positions at once, the latent is expanded to a key and a value for every head. A decode step does not expand
the cache: it applies the key projection to the query, and the value projection to the mixed latents. The step is then
multi-query attention with one key (latent and rotary key) and one value (the latent).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import AttentionConfig
from moe_jax.kernels.cached_attention.api import cached_attention
from moe_jax.model import rope
from moe_jax.model.attention import Cache, Kept, Mix
from moe_jax.model.layers import Stacked, one_layer, project, rms_norm

OUTPUT = "output_DHX"  # the output projection


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """Queries, latents and rotary keys, normed and rotated."""

    query_BTHA: jax.Array  # position-free channels, then rotated ones
    key_BTGA: jax.Array  # G is 1: the latent, then the rotary key
    up_HOZ: jax.Array  # projects the latent to each head's position-free key, then to its value
    attention: AttentionConfig

    @property
    def kept(self) -> Kept:
        """The latents and rotary keys that go into the cache."""
        return Kept(self.key_BTGA, None)

    @property
    def _scale(self) -> float:
        return rope.score_scale(self.attention, self.query_BTHA.shape[-1])

    def causal(self, segments_BT: jax.Array | None, mix: Mix, *, prefixes: bool) -> jax.Array:
        """Mixes positions of whole sequences: mixed_BTHX, see `causal_attention`."""
        start_B = jnp.zeros(len(self.query_BTHA), jnp.int32)
        return self._causal(self.key_BTGA, segments_BT, start_B, mix, prefixes)

    def extend(self, cache: Cache, layer: jax.Array | int, start_B: jax.Array, mix: Mix) -> tuple[jax.Array, Cache]:
        """Adds several positions of every row to the cache, as `GroupedHeads.extend`.

        Expands the latents of the whole cache.
        """
        cache = cache.extended(self.kept, layer, start_B)
        key_BMGA = one_layer(cache.key_LBMGA, layer)[..., : self.key_BTGA.shape[-1]]
        return self._causal(key_BMGA, None, start_B, mix, False), cache

    def _causal(self, key_BMGA, segments_BM, start_B, mix, prefixes):
        latent_BMGZ, rotary_BMGA = jnp.split(key_BMGA, [self.attention.latent_rank], axis=-1)
        expanded_BMHO = _einsum("bmz,hoz->bmho", latent_BMGZ[:, :, 0], self.up_HOZ)
        key_BMHA, value_BMHX = jnp.split(expanded_BMHO, [self.attention.nope_head_dim], axis=-1)
        rotary_BMHA = jnp.broadcast_to(rotary_BMGA, (*key_BMHA.shape[:3], rotary_BMGA.shape[-1]))
        key_BMHA = jnp.concatenate([key_BMHA, rotary_BMHA], axis=-1)
        inputs = (self.query_BTHA, key_BMHA, value_BMHX)
        return mix(*inputs, segments_BM, start_B, self._scale, prefixes=prefixes)

    def step(
        self, cache: Cache, layer: jax.Array | int, position_B: jax.Array, implementation: str
    ) -> tuple[jax.Array, Cache]:
        """Adds one position of every row to the cache and attends over the cache, as `GroupedHeads.step`."""
        key_up_HAZ, value_up_HXZ = jnp.split(self.up_HOZ, [self.attention.nope_head_dim], axis=1)
        query_BTHA, rotary_BTHA = jnp.split(self.query_BTHA, [self.attention.nope_head_dim], axis=-1)
        query_BTHZ = _einsum("btha,haz->bthz", query_BTHA, key_up_HAZ)
        query_BTHA = jnp.concatenate([query_BTHZ, rotary_BTHA], axis=-1)
        mixed_BHZ, *extended = cached_attention(
            query_BTHA[:, 0],
            self.key_BTGA[:, 0],
            None,
            *cache,
            layer,
            position_B,
            scale=self._scale,
            value_channels=self.attention.latent_rank,
            implementation=implementation,
        )
        return _einsum("bhz,hxz->bhx", mixed_BHZ, value_up_HXZ)[:, None], Cache(*extended)


def _einsum(sums: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product of x and a weight, whose dtype may be wider; the result has the dtype of x."""
    return jnp.einsum(sums, x, weight).astype(x.dtype)


def cached_widths(attention: AttentionConfig) -> tuple[int, int, int]:
    """As in `attention`: one head whose key contains its value."""
    return 1, attention.latent_rank + attention.rope_head_dim, 0


def heads(
    x_BTD: jax.Array,
    weights: dict[str, jax.Array | Stacked],
    cos_sin: tuple[jax.Array, jax.Array],
    attention: AttentionConfig,
    norm_eps: float,
) -> LatentHeads:
    """Projects to queries, latents and rotary keys.

    Args:
        x_BTD: normed activations.
        weights: the attention weights of one layer, names without the leading L.
        cos_sin: cosines and sines of the rotary angles.
        attention: the attention settings; the norms of latents use its `latent_norm_eps`.
        norm_eps: not used.
    """
    eps = attention.latent_norm_eps
    if attention.query_rank:
        query_latent_BTU = rms_norm(project(x_BTD, weights["query_down_UD"]), weights["query_latent_norm_U"], eps)
        query_BTHA = project(query_latent_BTU, weights["query_up_HAU"])
    else:
        query_BTHA = project(x_BTD, weights["query_HAD"])
    query_BTHA, rotary_BTHA = jnp.split(query_BTHA, [attention.nope_head_dim], axis=-1)
    rotary_BTHA = rope.rotate(rotary_BTHA, cos_sin, attention.rope_interleaved)

    latent_BTZ, rotary_BTA = jnp.split(project(x_BTD, weights["latent_WD"]), [attention.latent_rank], axis=-1)
    latent_BTGZ = rms_norm(latent_BTZ, weights["latent_norm_Z"], eps)[:, :, None]
    rotary_BTGA = rope.rotate(rotary_BTA[:, :, None], cos_sin, attention.rope_interleaved)

    up_HOZ = weights["key_value_up_HOZ"]
    return LatentHeads(
        jnp.concatenate([query_BTHA, rotary_BTHA], axis=-1),
        jnp.concatenate([latent_BTGZ, rotary_BTGA], axis=-1),
        up_HOZ.taken() if isinstance(up_HOZ, Stacked) else up_HOZ,
        attention,
    )
