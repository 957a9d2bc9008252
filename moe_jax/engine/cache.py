"""The attention cache: the shapes that requests are rounded up to, memory checks, and allocation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import memory
from moe_jax.config.architecture import Architecture
from moe_jax.model.attention import Cache
from moe_jax.model.decoder import ATTENTION
from moe_jax.model.sharding import Layout, constrained

SHORTEST = 16  # positions of the smallest bucket
CHUNK = 2048  # positions read at once; longer prompts are read in chunks


class Shape(NamedTuple):
    """The static shape of one batch of requests. Programs are compiled for it."""

    batch: int  # rows, a power of two for each part of the data axis
    length: int  # positions of the longest prompt, rounded up: within one chunk, or a multiple of it
    memory: int  # positions of the cache: prompt and continuation, rounded up


LETTERS = Cache("LBMGA", "LBMGX")


def round_up(count: int, parts: int = 1) -> int:
    """Rounds a positive number of rows up to a power of two; on a mesh, to one for each part of the data axis."""
    return parts << (-(-count // parts) - 1).bit_length()


def length_bucket(length: int, max_context: int) -> int:
    """Rounds a number of positions up to a power of two, at least 16 and at most the context."""
    return min(max(SHORTEST, round_up(length)), max_context)


def shape_of(prompts: Sequence[int], continuations: Sequence[int], max_context: int, parts: int = 1) -> Shape:
    """The smallest shape that holds a batch.

    Args:
        prompts: tokens of each prompt.
        continuations: tokens that may be added to each; with its prompt at most `max_context`.
        max_context: positions that the model supports.
        parts: of the data axis.
    """
    longest = max(prompt + continuation for prompt, continuation in zip(prompts, continuations))
    length, memory = length_bucket(max(prompts), max_context), length_bucket(longest, max_context)
    if length > CHUNK:
        length = -(-length // CHUNK) * CHUNK  # a context may end within a chunk
    return Shape(round_up(len(prompts), parts), length, max(length, memory))


def allocate(
    architecture: Architecture,
    batch: int,
    memory: int,
    dtype: jnp.dtype,
    layout: Layout | None = None,
    multiple: int = 1,
) -> Cache:
    """An empty cache of `batch` rows and `memory` positions; with a layout, in a compiled function.

    Latents are padded to a `multiple` of channels, that of the implementation of cached_attention.
    """
    shapes = _array_shapes(architecture, batch, memory, multiple)
    return Cache(
        *(
            constrained(jnp.zeros(shape, dtype), letters, layout) if shape else None
            for shape, letters in zip(shapes, LETTERS)
        )
    )


def require_memory(
    architecture: Architecture,
    rows_and_positions: Sequence[tuple[int, int]],
    dtype: np.dtype,
    layout: Layout | None = None,
    multiple: int = 1,
) -> None:
    """Checks that caches fit in the memory that the first device has left.

    Args:
        architecture: the model's architecture.
        rows_and_positions: the size of each cache; the error message names the first.
        dtype: the dtype of all caches.
        layout: the mesh that they lie on; None: one device.
        multiple: as `allocate`.

    Raises:
        ValueError: they do not fit; the message has the bytes needed and available.
    """
    needed_bytes = 0
    for one in rows_and_positions:
        for shape, letters in zip(_array_shapes(architecture, *one, multiple), LETTERS):
            if shape and layout is not None:
                shape = layout.of_letters(letters).shard_shape(shape)
            needed_bytes += math.prod(shape) * np.dtype(dtype).itemsize if shape else 0
    if layout is not None and jax.default_backend() == "cpu":
        needed_bytes *= len(layout.mesh.local_devices)  # which share the machine's memory
    rows, positions = rows_and_positions[0]
    what = f"the cache of {rows} prompts with up to {positions} tokens"
    memory.require(what, needed_bytes, memory.device_bytes(), "fewer prompts or fewer tokens")


def _array_shapes(architecture: Architecture, batch: int, memory: int, multiple: int) -> list[tuple[int, ...] | None]:
    """Shapes of keys and of values; None for the values if the keys hold them."""
    attention = architecture.attention
    kv_heads, *widths = ATTENTION[attention.kind].cached_widths(attention)
    if not widths[1]:
        widths[0] = -(-widths[0] // multiple) * multiple
    leading = (architecture.decoder.num_layers, batch, memory, kv_heads)
    return [(*leading, width) if width else None for width in widths]
