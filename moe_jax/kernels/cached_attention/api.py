"""Attention of one new position per row against a cache: the contract, and the implementations."""

import jax

from moe_jax.kernels.cached_attention import native, xla

IMPLEMENTATIONS = {"native": native, "xla": xla}
BY_PLATFORM = {"cpu": "native", "gpu": "xla", "tpu": "xla"}
WITHOUT_COMPILER = "xla"


def cached_attention(
    query_BHA: jax.Array,
    key_BGA: jax.Array,
    value_BGX: jax.Array | None,
    key_LBMGA: jax.Array,
    value_LBMGX: jax.Array | None,
    layer: jax.Array | int,
    position_B: jax.Array,
    scale: float,
    value_channels: int,
    implementation: str,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Writes the new key and value of every row into the cache, and mixes what the row sees: that and all before it.

    Softmax and sums are float32. Head h of the queries reads head h * G // H of keys and values. Has no gradient.

    Args:
        query_BHA: the new queries, rotated.
        key_BGA: the new keys, of the dtype of the cache.
        value_BGX: the new values; None where a key holds its value, as its first `value_channels`.
        key_LBMGA: the cache of all layers.
        value_LBMGX: the same; None where a key holds its value.
        layer: int32 scalar, the layer of the cache that is written and read.
        position_B: int32, the place of each row's new position in the cache, from 0 to M - 1.
        scale: of the scores, static.
        value_channels: X, static.
        implementation: a name from `IMPLEMENTATIONS`, static.

    Returns:
        mixed_BHX in the dtype of the queries, and both caches with the new position in them.
    """
    return IMPLEMENTATIONS[implementation].forward(
        query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels
    )
