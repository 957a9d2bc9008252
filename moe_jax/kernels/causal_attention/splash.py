"""Causal attention on TPUs: splash attention, which comes with JAX, forward and gradient."""

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import Architecture

PLATFORM = "tpu"
PREFIXES = False  # its segments see each other only if their numbers are equal
BLOCK = 512  # queries or keys per block, at most
LANES = 128  # blocks are multiples of this
_UNSEEN = -1  # the segment of keys that no query sees


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why it cannot run a model's attention; "" if it can."""
    return _lacks(dtype)


def _lacks(dtype: str) -> str:
    return "" if dtype in ("bfloat16", "float32") else f"multiplies bfloat16 and float32, not {dtype}"


def mix(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, *, interpret: bool = False):
    """As `api.causal_attention`, without prefix segments; differentiable.

    Queries are multiplied by the scale before the kernel, in their dtype. If there are fewer queries than keys, the
    keys of each row are moved so that the last query is at the last key, since the kernel's diagonal is static: one
    copy of keys and values, and the time that the last T queries of M take, wherever the row starts. `interpret` runs
    the kernels on any platform, for tests.

    Raises:
        ValueError: an input is neither bfloat16 nor float32.
    """
    dtype = jnp.result_type(query_BTHA, key_BMGA, value_BMGX)
    if reason := _lacks(dtype.name):
        raise ValueError(f"splash {reason}; blocked would run")
    _, length, heads, _ = query_BTHA.shape
    memory = key_BMGA.shape[1]
    if length < memory:
        key_BMGA, value_BMGX, segments_BM = _moved(key_BMGA, value_BMGX, segments_BM, start_B, memory - length)
    query_BTHA = query_BTHA.astype(dtype) * jnp.asarray(scale, dtype)
    blocks = [_block(size) for size in (length, memory)]
    shape = tuple(-(-size // block) * block for size, block in zip((length, memory), blocks))

    def operand(x_BTHA, size):
        padding = ((0, 0), (0, size - x_BTHA.shape[1]), (0, 0), (0, 0))
        return jnp.swapaxes(jnp.pad(x_BTHA.astype(dtype), padding), 1, 2)

    operands = operand(query_BTHA, shape[0]), operand(key_BMGA, shape[1]), operand(value_BMGX, shape[1])
    segments = None if segments_BM is None else _segment_ids(segments_BM, length, shape)
    kernel = _kernel(heads, shape, memory - length, blocks, interpret)
    mixed_BHTX = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(*operands, segments)
    return jnp.swapaxes(mixed_BHTX, 1, 2)[:, :length].astype(value_BMGX.dtype)


def _block(size: int) -> int:
    """The length of blocks that are as even as can be."""
    count = -(-size // BLOCK)
    return -(-size // (count * LANES)) * LANES


def _moved(key_BMGA, value_BMGX, segments_BM, start_B, most: int):
    """Keys, values and segments, moved by `most` - start: what queries do not see is moved out, or marked."""
    batch, memory = key_BMGA.shape[:2]
    source_BM = jnp.arange(memory)[None, :] - (most - start_B[:, None])
    from_BM = jnp.maximum(source_BM, 0)
    key_BMGA, value_BMGX = (
        jnp.take_along_axis(x, from_BM[:, :, None, None], axis=1, mode="clip") for x in (key_BMGA, value_BMGX)
    )
    if segments_BM is None:
        segments_BM = jnp.ones((batch, memory), jnp.int32)
    segments_BM = jnp.take_along_axis(segments_BM, from_BM, axis=1, mode="clip")
    return key_BMGA, value_BMGX, jnp.where(source_BM < 0, _UNSEEN, segments_BM)


def _segment_ids(segments_BM, length: int, shape: tuple[int, int]):
    """Those of queries, which are the last ones, and of keys; padding continues the last segment."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    def padded(segments_BT, size):
        return jnp.pad(segments_BT, ((0, 0), (0, size - segments_BT.shape[1])), mode="edge")

    return splash_attention.SegmentIds(q=padded(segments_BM[:, -length:], shape[0]), kv=padded(segments_BM, shape[1]))


def _kernel(heads: int, shape: tuple[int, int], offset: int, blocks: list[int], interpret: bool):
    """Query t sees the keys up to t + offset."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # takes half a second

    queries, keys = blocks
    sizes = splash_attention.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask(shape, offset)] * heads)
    return splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
