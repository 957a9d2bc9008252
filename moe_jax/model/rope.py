"""Rotary position embedding (arXiv 2104.09864), plain or extended by YaRN (arXiv 2309.00071)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import AttentionConfig


def frequencies(attention: AttentionConfig) -> np.ndarray:
    """Angle per position of every channel pair, float32 [rope_dim / 2]: theta ** (-2 i / rope_dim) for pair i.

    YaRN divides low frequencies by its factor and leaves high ones alone. In between, from the pair that turns
    `yarn_beta_fast` times over the original context to the one that turns `yarn_beta_slow` times, it interpolates
    linearly.
    """
    dim, theta = attention.rope_dim, attention.rope_theta
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if attention.yarn_factor > 1:

        def pair_of(turns: float) -> float:
            wavelength = attention.yarn_original_context / turns
            return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_of(attention.yarn_beta_fast)), 0)
        last = min(math.ceil(pair_of(attention.yarn_beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - first) / ((last - first) or 1e-3), 0, 1)
        frequency = frequency * (1 - ramp + ramp / attention.yarn_factor)
    return frequency.astype(np.float32)


def _mscale(factor: float, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(factor) + 1


def rotary_scale(attention: AttentionConfig) -> float:
    """The factor by which YaRN scales rotated channels.

    The paper's 0.1 ln(factor) + 1. Where DeepSeek gives both coefficients, `yarn_mscale_all_dim` scales whole heads
    (see `score_scale`), so it is divided out here.
    """
    if attention.yarn_mscale and attention.yarn_mscale_all_dim:
        whole_heads = _mscale(attention.yarn_factor, attention.yarn_mscale_all_dim)
        return _mscale(attention.yarn_factor, attention.yarn_mscale) / whole_heads
    return _mscale(attention.yarn_factor, 1)


def score_scale(attention: AttentionConfig, head_dim: int) -> float:
    """The factor of attention scores: head_dim ** -1/2, times YaRN's scale of whole queries and keys."""
    return head_dim**-0.5 * _mscale(attention.yarn_factor, attention.yarn_mscale_all_dim) ** 2


def angles(positions_BT: jax.Array, attention: AttentionConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, times `rotary_scale`, float32 [B, T, rope_dim / 2]."""
    angle = positions_BT.astype(jnp.float32)[:, :, None] * frequencies(attention)[None, None, :]
    scale = rotary_scale(attention)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x_BTHA: jax.Array, cos_sin: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
    """Rotates the first rope_dim channels of every head.

    Channel i is paired with i + rope_dim / 2, or, if interleaved, 2 i with 2 i + 1; the checkpoint decides. The result
    has the pairs as halves in both cases. Scores do not depend on the order, as queries and keys share it.
    """
    cos, sin = (t[:, :, None, :] for t in cos_sin)
    rotated, rest = jnp.split(x_BTHA.astype(jnp.float32), [2 * cos.shape[-1]], axis=-1)
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else jnp.split(rotated, 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(parts, axis=-1).astype(x_BTHA.dtype)
