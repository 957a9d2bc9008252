"""Attention of one new token per row against a cache: the contract and the implementations."""

import jax

from moe_jax.kernels.cached_attention import matmul, native, sums, xla

IMPLEMENTATIONS = {"native": native, "xla": xla, "matmul": matmul, "sums": sums}
BY_PLATFORM = {"cpu": ("native", "xla"), "gpu": ("sums",), "tpu": ("matmul",)}  # the best first


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
    """Writes the new key and value of every row into the cache, and attends to them and to all earlier positions.

    Softmax and sums are float32. Query head h reads key and value head h * G // H. Has no gradient.

    Args:
        query_BHA: the new queries, rotated.
        key_BGA: the new keys, in the dtype of the cache.
        value_BGX: the new values; None if the first `value_channels` of a key are its value.
        key_LBMGA: the keys cached for all layers.
        value_LBMGX: the values cached for all layers; None if `value_BGX` is None.
        layer: int32 scalar, the layer of the cache to write and read.
        position_B: int32, the position of each row's new token in the cache, from 0 to M - 1.
        scale: factor of the scores, static.
        value_channels: X, static.
        implementation: a name from `IMPLEMENTATIONS`, static.

    Returns:
        mixed_BHX in the dtype of the queries, and both caches with the new tokens.
    """
    return IMPLEMENTATIONS[implementation].forward(
        query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels
    )


def channel_multiple(implementation: str) -> int:
    """What the channels of a cached latent are padded to a multiple of; the padding is zero, and stays so."""
    return getattr(IMPLEMENTATIONS[implementation], "CHANNELS", 1)
