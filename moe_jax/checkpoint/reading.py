"""Reads parameters from the tensors of files into memory or onto devices.

Everything goes through `read`, which reads parts of parameters: the whole parameter, or the shard of a device, for
which only its own bytes are read.
"""

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import memory
from moe_jax.checkpoint import filling
from moe_jax.checkpoint.quantization import Blocks
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.dispatch.contract import scale_spec
from moe_jax.dispatch.placement import ExpertPlacement
from moe_jax.kernels import quantized
from moe_jax.kernels.quantized import Quantized
from moe_jax.model import parameters

Index = tuple[slice, ...]
HostArray = np.ndarray | Quantized  # the parts of the latter are NumPy arrays
ShardingOf = Callable[[parameters.Parameter], jax.sharding.Sharding | None]


class Moved(NamedTuple):
    """One index of a parameter's dimension that one index of a tensor's dimension fills."""

    place: int
    source: int
    size: int  # of the tensor's dimension


class Piece(NamedTuple):
    """One tensor of a file, and the slice of a stacked parameter that it fills."""

    name: str
    index: tuple[int | slice | Moved, ...]
    stored: StoredTensor
    scale: StoredTensor | None = None  # of its blocks, if it is quantised


class Stack(NamedTuple):
    """The location of one parameter in files, and its form in memory.

    Attributes:
        path: in the tree of parameters.
        shape: the shape of the whole parameter.
        dtype: in memory.
        pieces: all of its tensors.
        mapped: whether its file is mapped instead of copied; it then has one piece, stored as it is used in memory.
        halved_itemsize: bytes of each number if the model is loaded in 16 bits: 4 for one that stays in float32.
        block: for a parameter in eight bits, the size of the blocks that share a scale; the last may be smaller. None:
            it is an array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]
    mapped: bool
    halved_itemsize: int = 2
    block: Blocks | None = None

    @property
    def even_block(self) -> tuple[int, int]:
        """The blocks in memory, which divide the matrices."""
        return quantized.even_block(self.block, *self.shape[-2:])

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales in memory."""
        return *self.shape[:-2], *(size // one for size, one in zip(self.shape[-2:], self.even_block))

    def scale_part(self, part: Index) -> Index:
        """The scales of a part, which begins and ends with a block unless there is only one."""
        last = zip(part[-2:], self.even_block, self.shape[-2:])
        return *part[:-2], *(filling.blocks_of_part(*one) for one in last)

    def bytes_of(self, part: Index) -> int:
        """Bytes of a part in memory, scales included."""
        scales = 0 if self.block is None else 4 * math.prod(_shape(self.scale_part(part)))
        return math.prod(_shape(part)) * self.dtype.itemsize + scales

    def allocate(self, part: Index) -> HostArray:
        """Memory for a part, not initialised."""
        values = filling.allocate(_shape(part), self.dtype)
        if self.block is None:
            return values
        return Quantized(values, filling.allocate(_shape(self.scale_part(part)), np.dtype(np.float32)))


def place_experts(stack: Stack, placement: ExpertPlacement | None) -> Stack:
    """The location of a parameter whose experts are placed; any other parameter unchanged."""
    if placement is None or not parameters.is_routed(parameters.find([stack.path])):
        return stack
    held_LE = placement.held_LE
    layers, experts, *_ = stack.shape

    def moves(at: int | slice, place: int, source: int, size: int) -> list[int | Moved]:
        """The index that fills `place` from `source`, if the piece has it."""
        if isinstance(at, int):
            return [place] if at == source else []
        first, end, _ = at.indices(size)
        return [Moved(place, source - first, end - first)] if first <= source < end else []

    pieces = [
        piece._replace(index=(layer_index, place_index, *piece.index[2:]))
        for piece in stack.pieces
        for layer in ([piece.index[0]] if isinstance(piece.index[0], int) else range(layers))
        for layer_index in moves(piece.index[0], layer, layer, layers)
        for place, expert in enumerate(held_LE[layer].tolist())
        for place_index in moves(piece.index[1], place, expert, experts)
    ]
    shape = (layers, held_LE.shape[1], *stack.shape[2:])
    return stack._replace(shape=shape, pieces=tuple(pieces), mapped=False)


def whole_index(stack: Stack) -> Index:
    """The part that is the whole parameter."""
    return tuple(slice(0, size) for size in stack.shape)


def read(
    folder: pathlib.Path, stacks: Sequence[Stack], parts: Sequence[Sequence[Index]], blocks: Blocks | None
) -> list[list[HostArray]]:
    """Reads parts of parameters into host memory; of each tensor only the bytes of these parts.

    Args:
        folder: the model's folder, for messages.
        stacks: the parameters.
        parts: the parts of each to read, as slices with a start and an end.
        blocks: the size of the blocks that share a scale, if tensors are quantised.

    Returns:
        An array for each part. Arrays of mapped parameters cannot be written to.

    Raises:
        ValueError: the parts do not fit in memory, a file is truncated, or a value that is copied is not finite.
    """
    _require_memory(folder, stacks, parts)
    sources: list[filling.Source | filling.QuantizedSource] = []
    found: list[list[HostArray]] = []
    for stack, stack_parts in zip(stacks, parts, strict=True):
        if stack.mapped:
            values = filling.map_values(stack.pieces[0].stored)
            found.append([values[part] for part in stack_parts])
            continue
        arrays = [stack.allocate(part) for part in stack_parts]
        for part, array in zip(stack_parts, arrays):
            sources += _sources(stack, part, array, blocks)
        found.append(arrays)
    filling.fill(sources)
    return found


def read_whole(folder: pathlib.Path, stacks: Sequence[Stack], blocks: Blocks | None) -> dict[str, HostArray]:
    """Reads parameters into host memory, by their paths."""
    arrays = read(folder, stacks, [[whole_index(stack)] for stack in stacks], blocks)
    return {stack.path: array for stack, [array] in zip(stacks, arrays)}


def load_onto_devices(
    folder: pathlib.Path, stacks: Sequence[Stack], blocks: Blocks | None, sharding_of: ShardingOf
) -> dict[str, jax.Array | Quantized]:
    """Loads parameters onto devices, by their paths.

    Each distinct shard is read once, for all devices that hold it. On a CPU JAX uses the memory into which it was read.
    Arrays are moved one at a time: at most one array is in memory twice.

    Args:
        folder: as `read` takes it.
        stacks: the parameters.
        blocks: as `read` takes it.
        sharding_of: gives the sharding of a parameter; None: on the default device.
    """
    shardings = [sharding_of(parameters.find([stack.path])) for stack in stacks]
    scale_shardings = [_sharding_of_scales(*pair) for pair in zip(stacks, shardings)]
    places = [_places(*pair) for pair in zip(stacks, shardings)]
    parts = [list(dict.fromkeys(part for part, _ in place)) for place in places]
    arrays = read(folder, stacks, [[_index(part) for part in stack_parts] for stack_parts in parts], blocks)
    loaded = {}
    for stack, sharding, scale_sharding, place, stack_parts in zip(stacks, shardings, scale_shardings, places, parts):
        by_part = dict(zip(stack_parts, arrays.pop(0)))
        on_devices = [
            jax.block_until_ready(jax.device_put(by_part[part], device, may_alias=True)) for part, device in place
        ]
        if stack.block is None:
            loaded[stack.path] = _joined(stack.shape, sharding, on_devices)
        else:
            values = _joined(stack.shape, sharding, [one.values for one in on_devices])
            scale = _joined(stack.scale_shape, scale_sharding, [one.scale for one in on_devices])
            loaded[stack.path] = Quantized(values, scale)
    return loaded


def _joined(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None, on_devices: list[jax.Array]) -> jax.Array:
    if sharding is None:
        return on_devices[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def _sharding_of_scales(stack: Stack, sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """That of the weights, but a block that spans an axis is on all of its devices.

    Raises:
        ValueError: a device's part of the weights would end within a block.
    """
    if stack.block is None or not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    scale_sharding = jax.sharding.NamedSharding(sharding.mesh, scale_spec(sharding.spec, stack.scale_shape))
    for size, axes in zip(stack.scale_shape, scale_sharding.spec):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if size % math.prod(sharding.mesh.shape[name] for name in names):
            raise ValueError(
                f"{stack.path} has {size} blocks of {' x '.join(map(str, stack.even_block))} weights that share a "
                f"scale: expected a multiple of the size of mesh axis {', '.join(names)}, or model.expert_dtype=model"
            )
    return scale_sharding


Bounds = tuple[tuple[int, int], ...]  # a part as start and end of each dimension, which can be hashed


def _places(stack: Stack, sharding: jax.sharding.Sharding | None) -> list[tuple[Bounds, jax.Device | None]]:
    """The part that each device of this process holds."""
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


def _sources(
    stack: Stack, part: Index, array: HostArray, blocks: Blocks | None
) -> Iterable[filling.Source | filling.QuantizedSource]:
    """For each tensor that overlaps a part: the slice to read, and where it goes in the part's array."""
    for piece in stack.pieces:
        place: list[int | slice] = []
        taken: list[slice] = []
        seen_as: list[int] = []
        for at, bounds, size in zip(piece.index, part, stack.shape, strict=True):
            if isinstance(at, Moved):
                first, end = at.place, at.place + 1
            else:
                first, end = (at, at + 1) if isinstance(at, int) else at.indices(size)[:2]
            low, high = max(first, bounds.start), min(end, bounds.stop)
            if low >= high:
                break
            if isinstance(at, int):
                place.append(at - bounds.start)
                continue
            place.append(slice(low - bounds.start, high - bounds.start))
            if isinstance(at, Moved):
                taken.append(slice(at.source, at.source + 1))
                seen_as.append(at.size)
            else:
                taken.append(slice(low - first, high - first))
                seen_as.append(end - first)
        else:
            if stack.block is not None:
                into, cut = array.values[tuple(place)], (tuple(seen_as), tuple(taken))
                scales = array.scale[tuple(place[:-2])]
                stored = piece.stored, into, piece.scale, blocks
                yield filling.QuantizedSource(piece.name, *stored, *cut, scales, stack.block)
                continue
            is_whole = [*map(slice, [0] * len(seen_as), seen_as)] == taken
            cut = () if is_whole else (tuple(seen_as), tuple(taken))
            yield filling.Source(piece.name, piece.stored, array[tuple(place)], piece.scale, blocks, *cut)


def _require_memory(folder: pathlib.Path, stacks: Sequence[Stack], parts: Sequence[Sequence[Index]]) -> None:
    """Refuses what does not fit in memory; mapped parameters do not count, since the system can drop their pages."""
    needed_bytes = halved_bytes = 0
    for stack, stack_parts in zip(stacks, parts):
        if stack.mapped:
            continue
        needed_bytes += (own_bytes := sum(map(stack.bytes_of, stack_parts)))
        numbers = sum(math.prod(_shape(part)) for part in stack_parts)
        halved_bytes += numbers * stack.halved_itemsize if stack.block is None else own_bytes
    available_bytes = memory.host_bytes()
    remedy = "a smaller model"
    if halved_bytes <= available_bytes:
        remedy = f"model.dtype=bfloat16, which needs {halved_bytes / 1e9:.1f} GB"
    memory.require(str(folder), needed_bytes, available_bytes, remedy)
