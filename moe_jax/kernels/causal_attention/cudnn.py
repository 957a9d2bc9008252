"""Causal attention on NVIDIA GPUs by cuDNN, through `jax.nn.dot_product_attention`; forward and gradient.

cuDNN knows the diagonal of whole sequences. Segments, and queries that start at a later position, need a mask of
[B, 1, T, M] numbers in the dtype of the queries: 134 MB per row for 8,192 queries and keys in 16 bits.
"""

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import Architecture

PLATFORM = "gpu"
WIDEST = 256  # of a head, on Hopper and later; before, half of that
_EVEN = 8  # a masked call takes lengths in multiples of this
_IMPLEMENTATION = "cudnn"


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why it cannot run a model's attention; "" if it can."""
    attention = architecture.attention
    width = attention.head_dim
    if attention.kind == "latent":
        width = max(attention.nope_head_dim + attention.rope_head_dim, attention.value_head_dim)
    return _lacks(dtype, width)


def _lacks(dtype: str, width: int) -> str:
    if dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {dtype}"
    widest = WIDEST
    if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 9:
        widest //= 2
    if width > widest or width % 8:
        return f"needs heads of a multiple of 8 and of at most {widest} channels, not {width}"
    return ""


def mix(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale):
    """As `api.causal_attention`; differentiable.

    The gradient is the same bit for bit from run to run only under `--xla_gpu_deterministic_ops=true`. Values that are
    narrower than keys are padded (a half more for heads of 192 and 128 channels), and the other way round.

    Raises:
        ValueError: cuDNN lacks the dtype or the width.
    """
    dtype = jnp.result_type(query_BTHA, key_BMGA, value_BMGX)
    width = max(query_BTHA.shape[-1], value_BMGX.shape[-1])
    if reason := _lacks(dtype.name, width):
        raise ValueError(f"cudnn {reason}; blocked would run")
    length, memory = query_BTHA.shape[1], key_BMGA.shape[1]
    mask_B1TM, extra = None, (0, 0)
    if segments_BM is not None or length < memory:
        extra = -length % _EVEN, -memory % _EVEN
        mask_B1TM = _mask(segments_BM, start_B, length, memory, extra)

    def operand(x_BTHA, extra):
        padding = ((0, 0), (0, extra), (0, 0), (0, width - x_BTHA.shape[-1]))
        return jnp.pad(x_BTHA.astype(dtype), padding)

    mixed_BTHX = jax.nn.dot_product_attention(
        operand(query_BTHA, extra[0]),
        operand(key_BMGA, extra[1]),
        operand(value_BMGX, extra[1]),
        mask=mask_B1TM,
        scale=scale,
        is_causal=length == memory,
        implementation=_IMPLEMENTATION,
    )
    return mixed_BTHX[:, :length, :, : value_BMGX.shape[-1]].astype(value_BMGX.dtype)


def _mask(segments_BM, start_B, length: int, memory: int, extra: tuple[int, int]) -> jax.Array:
    """What queries see, [B, 1, T, M], with padding; a query of the padding sees what its row's last position sees."""
    position_BT = jnp.minimum(start_B[:, None] + jnp.arange(length + extra[0])[None, :], memory - 1)
    position_M = jnp.arange(memory)
    seen_BTM = position_BT[:, :, None] >= position_M[None, None, :]
    if segments_BM is not None:
        segment_BT = jnp.take_along_axis(segments_BM, position_BT, axis=1)
        in_sight_BTM = (segment_BT[:, :, None] == segments_BM[:, None, :]) | (segments_BM < 0)[:, None, :]
        seen_BTM &= in_sight_BTM
    return jnp.pad(seen_BTM, ((0, 0), (0, 0), (0, extra[1])))[:, None]
