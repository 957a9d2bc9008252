"""Rotary positions (arXiv 2104.09864), plain or stretched by YaRN (arXiv 2309.00071)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import AttentionConfig


def frequencies(attention: AttentionConfig) -> np.ndarray:
    """Angle per position of every channel pair, float32 [rope_dim / 2]: pair i turns at theta ** (-2 i / rope_dim).

    YaRN divides the frequencies of slow pairs by its factor and leaves fast ones alone. Between the pair that turns
    `yarn_beta_fast` times over the original context and the one that turns `yarn_beta_slow` times lies a linear ramp.
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


def turn_scale(attention: AttentionConfig) -> float:
    """What YaRN scales rotated channels by.

    The paper's 0.1 ln(factor) + 1; DeepSeek, where it gives both coefficients, scales whole heads by the one and so
    divides it out here.
    """
    if attention.yarn_mscale and attention.yarn_mscale_all_dim:
        of_all = _mscale(attention.yarn_factor, attention.yarn_mscale_all_dim)
        return _mscale(attention.yarn_factor, attention.yarn_mscale) / of_all
    return _mscale(attention.yarn_factor, 1)


def score_scale(attention: AttentionConfig, head_dim: int) -> float:
    """What attention scores are multiplied by: head_dim ** -1/2, and what YaRN scales whole queries and keys by."""
    return head_dim**-0.5 * _mscale(attention.yarn_factor, attention.yarn_mscale_all_dim) ** 2


def angles(positions_BT: jax.Array, attention: AttentionConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines that channel pairs turn by, scaled, float32 [B, T, rope_dim / 2]."""
    angle = positions_BT.astype(jnp.float32)[:, :, None] * frequencies(attention)[None, None, :]
    scale = turn_scale(attention)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x_BTHA: jax.Array, turn: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
    """Rotates the first rope_dim channels of every head.

    Channel i is paired with i + rope_dim / 2, or, interleaved, 2 i with 2 i + 1: a convention of the checkpoint. Pairs
    come out as halves either way: queries and keys agree, and nothing else looks at them.
    """
    cos, sin = (t[:, :, None, :] for t in turn)
    rotated, rest = jnp.split(x_BTHA.astype(jnp.float32), [2 * cos.shape[-1]], axis=-1)
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else jnp.split(rotated, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHA.dtype)
