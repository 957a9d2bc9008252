"""Rotary positions (arXiv 2104.09864), in the half-split convention of the checkpoints' own code."""

import jax
import jax.numpy as jnp


def angles(positions_BT: jax.Array, rope_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, rope_dim / 2]; channel pair i turns at theta ** (-2 i / rope_dim)."""
    frequency = 1.0 / theta ** (jnp.arange(0, rope_dim, 2, dtype=jnp.float32) / rope_dim)
    angle = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHA: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first rope_dim channels of every head; channel i is paired with i + rope_dim / 2."""
    cos, sin = (t[:, :, None, :] for t in turn)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTHA.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHA.dtype)
