"""The cache of attention: the shapes that requests round up to, its bytes, and its allocation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from moe_jax.config.architecture import Architecture
from moe_jax.model.attention import Cache
from moe_jax.model.decoder import ATTENTION

SHORTEST = 16  # positions of the smallest bucket
CHUNK = 2048  # positions of a longer prompt that are read at once


class Shape(NamedTuple):
    """The static shape of one batch of requests: what its programs are compiled for."""

    batch: int  # rows, a power of two
    length: int  # positions of the longest prompt, rounded up: one chunk, or several whole ones
    memory: int  # positions of the cache: prompt and continuation, rounded up


def round_up(count: int) -> int:
    """The smallest power of two that is not below a positive count: the bucket of a number of rows."""
    return 1 << (count - 1).bit_length()


def length_bucket(length: int, max_context: int) -> int:
    """The bucket of a number of positions: a power of two, at least 16, at most the context."""
    return min(max(SHORTEST, round_up(length)), max_context)


def shape_of(prompts: Sequence[int], continuations: Sequence[int], max_context: int) -> Shape:
    """The shape that holds a batch.

    Args:
        prompts: tokens of each prompt.
        continuations: tokens that each may grow by; together with its prompt at most `max_context`.
        max_context: positions that the model takes.
    """
    longest = max(prompt + continuation for prompt, continuation in zip(prompts, continuations))
    length, memory = length_bucket(max(prompts), max_context), length_bucket(longest, max_context)
    if length > CHUNK:
        length = -(-length // CHUNK) * CHUNK  # a context may end within a chunk
    return Shape(round_up(len(prompts)), length, max(length, memory))


def allocate(architecture: Architecture, batch: int, memory: int, dtype: jnp.dtype) -> Cache:
    """An empty cache of `batch` rows and `memory` positions."""
    return Cache(*(jnp.zeros(shape, dtype) if shape else None for shape in _array_shapes(architecture, batch, memory)))


def require_memory(architecture: Architecture, rows_and_positions: Sequence[tuple[int, int]], dtype: np.dtype) -> None:
    """Refuses caches that do not fit beside what the first device already holds.

    Args:
        architecture: of the model.
        rows_and_positions: of each cache, the one that the message names first.
        dtype: of all.

    Raises:
        ValueError: saying what they need and what is available.
    """
    shapes = [shape for one in rows_and_positions for shape in _array_shapes(architecture, *one) if shape]
    needed_bytes = sum(math.prod(one) for one in shapes) * np.dtype(dtype).itemsize
    free_bytes = available_bytes()
    if needed_bytes > free_bytes:
        rows, positions = rows_and_positions[0]
        raise ValueError(
            f"the cache of {rows} prompts with up to {positions} tokens needs {needed_bytes / 1e9:.1f} GB, "
            f"{free_bytes / 1e9:.1f} GB available: expected fewer prompts or fewer tokens"
        )


def _array_shapes(architecture: Architecture, batch: int, memory: int) -> list[tuple[int, ...] | None]:
    """Of keys and of values; None where the keys hold the values."""
    attention = architecture.attention
    kv_heads, *widths = ATTENTION[attention.kind].cached_widths(attention)
    leading = (architecture.decoder.num_layers, batch, memory, kv_heads)
    return [(*leading, width) if width else None for width in widths]


def available_bytes() -> int:
    """Memory that the first device has left; on a CPU, this machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available
