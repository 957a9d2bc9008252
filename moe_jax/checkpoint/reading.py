"""From the tensors of files to parameters in memory or on devices: which lie where, and which part of them is expected.

Everything goes through `read`: a whole model is its one part, and a shard on a device is another part, of which only
the bytes that belong to it are read.
"""

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import psutil

from moe_jax.checkpoint import filling
from moe_jax.checkpoint.quantization import Blocks
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.model import parameters

Index = tuple[slice, ...]
ShardingOf = Callable[[parameters.Parameter], jax.sharding.Sharding | None]


class Piece(NamedTuple):
    """One tensor of a file, and the slice of a stacked parameter that it fills."""

    name: str
    index: tuple[int | slice, ...]
    stored: StoredTensor
    scale: StoredTensor | None = None  # of its blocks, if it is quantised


class Stack(NamedTuple):
    """Where one parameter is to be found, and how it is expected.

    Attributes:
        path: its place in the tree of parameters.
        shape: of the whole of it.
        dtype: in memory.
        pieces: all of its tensors.
        mapped: whether it has one piece, which lies in its file as it is expected in memory: it is not copied.
        halved_itemsize: bytes of each number in a dtype of 16 bits, which not every parameter may have.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]
    mapped: bool
    halved_itemsize: int = 2


def whole(stack: Stack) -> Index:
    """The part that is all of it."""
    return tuple(slice(0, size) for size in stack.shape)


def read(
    folder: pathlib.Path, stacks: Sequence[Stack], parts: Sequence[Sequence[Index]], blocks: Blocks | None
) -> list[list[np.ndarray]]:
    """Reads parts of parameters into host memory, each with only the bytes that it is made of.

    Args:
        folder: of the model, for messages.
        stacks: the parameters.
        parts: of each, those that are expected, as slices with a start and an end.
        blocks: what shares a scale where tensors are quantised.

    Returns:
        An array for each part. What is mapped lies in the file, and cannot be written to.

    Raises:
        ValueError: the parts do not fit in memory, a file is truncated, or a value that is copied is not finite.
    """
    _require_memory(folder, stacks, parts)
    sources: list[filling.Source] = []
    found: list[list[np.ndarray]] = []
    for stack, expected in zip(stacks, parts, strict=True):
        if stack.mapped:
            values = filling.map_values(stack.pieces[0].stored)
            found.append([values[part] for part in expected])
            continue
        arrays = [filling.allocate(_shape(part), stack.dtype) for part in expected]
        for part, array in zip(expected, arrays):
            sources += _sources(stack, part, array, blocks)
        found.append(arrays)
    filling.fill(sources)
    return found


def read_whole(folder: pathlib.Path, stacks: Sequence[Stack], blocks: Blocks | None) -> dict[str, np.ndarray]:
    """Reads parameters into host memory, by their paths."""
    arrays = read(folder, stacks, [[whole(stack)] for stack in stacks], blocks)
    return {stack.path: array for stack, [array] in zip(stacks, arrays)}


def load(
    folder: pathlib.Path, stacks: Sequence[Stack], blocks: Blocks | None, sharding_of: ShardingOf
) -> dict[str, jax.Array]:
    """Brings parameters onto devices, by their paths.

    Every shard is read by itself, once for all devices that hold the same. On a CPU JAX takes over the memory in which
    it is read. Arrays are moved one at a time: nothing but the largest is held twice.

    Args:
        folder: as `read` takes it.
        stacks: the parameters.
        blocks: as `read` takes it.
        sharding_of: how each parameter lies; None: on the default device.
    """
    shardings = [sharding_of(parameters.find([stack.path])) for stack in stacks]
    places = [_places(*pair) for pair in zip(stacks, shardings)]
    parts = [list(dict.fromkeys(part for part, _ in place)) for place in places]
    arrays = read(folder, stacks, [[_index(part) for part in expected] for expected in parts], blocks)
    loaded = {}
    for stack, sharding, place, expected in zip(stacks, shardings, places, parts):
        of_part = dict(zip(expected, arrays.pop(0)))
        on_devices = [
            jax.device_put(of_part[part], device, may_alias=True).block_until_ready() for part, device in place
        ]
        loaded[stack.path] = (
            on_devices[0]
            if sharding is None
            else jax.make_array_from_single_device_arrays(stack.shape, sharding, on_devices)
        )
    return loaded


Bounds = tuple[tuple[int, int], ...]  # of a part: an index that can be hashed


def _places(stack: Stack, sharding: jax.sharding.Sharding | None) -> list[tuple[Bounds, jax.Device | None]]:
    """The part of each device of this process."""
    if sharding is None:
        return [(tuple((0, size) for size in stack.shape), None)]
    indices = sharding.addressable_devices_indices_map(stack.shape)
    return [
        (tuple(one.indices(size)[:2] for one, size in zip(index, stack.shape, strict=True)), device)
        for device, index in indices.items()
    ]


def _index(bounds: Bounds) -> Index:
    return tuple(slice(*one) for one in bounds)


def _shape(part: Index) -> tuple[int, ...]:
    return tuple(one.stop - one.start for one in part)


def _sources(stack: Stack, part: Index, array: np.ndarray, blocks: Blocks | None) -> Iterable[filling.Source]:
    """What of each tensor goes where in the array of a part."""
    for piece in stack.pieces:
        place: list[int | slice] = []
        taken: list[slice] = []
        seen_as: list[int] = []
        for at, expected, size in zip(piece.index, part, stack.shape, strict=True):
            first, end = (at, at + 1) if isinstance(at, int) else at.indices(size)[:2]
            low, high = max(first, expected.start), min(end, expected.stop)
            if low >= high:
                break
            if isinstance(at, int):
                place.append(at - expected.start)
            else:
                place.append(slice(low - expected.start, high - expected.start))
                taken.append(slice(low - first, high - first))
                seen_as.append(end - first)
        else:
            all_of_it = [*map(slice, [0] * len(seen_as), seen_as)] == taken
            cut = () if all_of_it else (tuple(seen_as), tuple(taken))
            yield filling.Source(piece.name, piece.stored, array[tuple(place)], piece.scale, blocks, *cut)


def _require_memory(folder: pathlib.Path, stacks: Sequence[Stack], parts: Sequence[Sequence[Index]]) -> None:
    """Refuses what does not fit; what is mapped takes none that the system could not take back."""
    needed_bytes = halved_bytes = 0
    for stack, expected in zip(stacks, parts):
        numbers = 0 if stack.mapped else sum(math.prod(_shape(part)) for part in expected)
        needed_bytes += numbers * stack.dtype.itemsize
        halved_bytes += numbers * stack.halved_itemsize
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        needed, available = f"{needed_bytes / 1e9:.1f} GB", f"{available_bytes / 1e9:.1f} GB"
        remedy = "a smaller model"
        if halved_bytes <= available_bytes:
            remedy = f"model.dtype=bfloat16, which needs {halved_bytes / 1e9:.1f} GB"
        raise ValueError(f"{folder} needs {needed} of memory, {available} available: expected {remedy}")
