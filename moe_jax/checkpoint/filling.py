"""Fills parameters from stored tensors: copies values from the mapped file to their place, and checks them.

The system zeroes fresh memory page by page when it is first written, which takes longer than the copy; several threads
share that, and NumPy asks for huge pages by itself. Where there is a C++ compiler, values that keep their dtype are
copied and checked in one pass (`copying.cc`).
"""

import ctypes
import functools
import math
import mmap
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
from absl import logging
from tqdm import tqdm

from moe_jax.checkpoint.quantization import FLOAT8, Blocks, dequantize
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.kernels import compiled, quantized

_ALIGNMENT_BYTES = 64  # JAX on a CPU uses memory without copying it if it is aligned to this
_COPIED_BYTES = 4 << 20  # at once
_CHECKED_BYTES = 1 << 18  # at once: small enough to stay in a core's cache
_MOST_THREADS = 8
_COPYING = pathlib.Path(__file__).with_name("copying.cc")
# dtype -> the integers that hold its bits, and the bits of its exponent: all set in NaN and infinity
EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_BITS = EXPONENTS | {FLOAT8: (np.uint8, 0x7F)}  # which has no infinity
_scratch = threading.local()


class Source(NamedTuple):
    """One tensor of a checkpoint and where it goes.

    Attributes:
        name: the name of the tensor.
        stored: its location in a file.
        destination: contiguous, in the order of the tensor, of any dtype of `EXPONENTS`.
        scale: the location of the scales of its blocks, if it is quantised.
        blocks: the size of the blocks that share a scale.
        seen_as: the shape that `part` refers to, where only a part of the tensor is read.
        part: that part, which has the shape of the destination.
    """

    name: str
    stored: StoredTensor
    destination: np.ndarray
    scale: StoredTensor | None = None
    blocks: Blocks | None = None
    seen_as: tuple[int, ...] = ()
    part: tuple[slice, ...] = ()


class QuantizedSource(NamedTuple):
    """As `Source`, for weights that are in eight bits in memory.

    Attributes:
        name: the name of the tensor.
        stored: its location in a file.
        destination: values, [stacked.., outputs, inputs].
        scale: the location of the scales of its blocks, if it is stored in eight bits.
        blocks: the size of those blocks.
        seen_as: the shape that `part` refers to.
        part: the part that is read, which has the shape of the destination.
        scale_destination: float32 scales of the destination's blocks.
        block: the size of the blocks in memory, of which the last may be smaller; those of `blocks` if the tensor is
            stored in the dtype of the destination.
    """

    name: str
    stored: StoredTensor
    destination: np.ndarray
    scale: StoredTensor | None
    blocks: Blocks | None
    seen_as: tuple[int, ...]
    part: tuple[slice, ...]
    scale_destination: np.ndarray
    block: Blocks


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory, aligned so that `jax.device_put` on a CPU uses it instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[first : first + size].view(dtype).reshape(shape)


def fill(sources: Sequence[Source | QuantizedSource]) -> None:
    """Reads all tensors, in the order of their files.

    Raises:
        ValueError: a tensor is not finite in the dtype of its destination, or its file ends within it. The message
            names the first such tensor.
    """
    sources = sorted(sources, key=lambda source: (source.stored.path, source.stored.start))
    tensors = [tensor for source in sources for tensor in (source.stored, source.scale) if tensor is not None]
    files = {path: _mapped(path) for path in dict.fromkeys(tensor.path for tensor in tensors)}
    copying = _copying()
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        done = pool.map(lambda source: _fill(source, files, copying), sources)
        for _ in tqdm(done, desc="load", unit=" tensors", total=len(sources), disable=None, leave=False):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def read_values(stored: StoredTensor) -> np.ndarray:
    """The values of one tensor, in its shape: a view of the mapped file.

    Raises:
        ValueError: the file ends within it.
    """
    return _values(stored, {stored.path: _mapped(stored.path)}).reshape(stored.shape)


def map_values(stored: StoredTensor) -> np.ndarray:
    """As `read_values`, for an array that is kept: the system reads pages on first use, and may drop them again.

    The file must not change. The array cannot be written to.
    """
    return _values(stored, {stored.path: _mapped(stored.path, sequential=False)}).reshape(stored.shape)


def require_finite(values: np.ndarray, name: str) -> None:
    """Raises ValueError, naming the tensor, if a value is NaN or infinite; `values` is contiguous."""
    bits, exponent = _BITS[values.dtype]
    flat = values.reshape(-1).view(bits)
    step = _CHECKED_BYTES // flat.itemsize
    for first in range(0, flat.size, step):
        piece = flat[first : first + step]
        masked = np.bitwise_and(piece, bits(exponent), out=_buffer("masked", piece.nbytes).view(bits))
        if masked.max() == exponent:
            raise ValueError(f"tensor {name} holds NaN or infinity as {values.dtype.name}")


def cast_into(destination: np.ndarray, values: np.ndarray) -> None:
    """Converts values to the dtype of the destination; an overflow becomes infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(destination, values, casting="unsafe")


def _mapped(path: pathlib.Path, sequential: bool = True) -> np.ndarray:
    """The bytes of a file, memory-mapped."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if sequential and hasattr(mmap, "MADV_SEQUENTIAL"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)
    return np.frombuffer(mapped, np.uint8)


@functools.cache
def _copying() -> ctypes.CDLL | None:
    """`copying.cc`, compiled. None, with a warning, if that fails: NumPy then copies, more slowly."""
    try:
        return compiled.open_library(_COPYING)
    except (ValueError, OSError) as error:
        logging.warning("loading is slower: %s", error)
        return None


def _fill(
    source: Source | QuantizedSource, files: Mapping[pathlib.Path, np.ndarray], copying: ctypes.CDLL | None
) -> None:
    if isinstance(source, QuantizedSource):
        _fill_quantized(source, files)
        return
    values, flat = _values(source.stored, files), source.destination.reshape(-1)
    expected = math.prod(source.seen_as) if source.part else flat.size
    if values.size != expected:
        raise ValueError(f"tensor {source.name} has {values.size} values: expected {expected}")
    if source.scale is not None:
        _fill_scaled(source, values, files)
        return
    if source.part:
        values = values.reshape(source.seen_as)[source.part]
        if not values.flags.c_contiguous:
            _fill_strided(source, values)
            return
        values = values.reshape(-1)
    step = _COPIED_BYTES // flat.itemsize
    for first in range(0, flat.size, step):
        piece, read = flat[first : first + step], values[first : first + step]
        if copying is not None and piece.dtype == read.dtype:
            if not _copy(piece, read, copying):
                require_finite(piece, source.name)
        else:
            cast_into(piece, read)
            require_finite(piece, source.name)


def _fill_strided(source: Source, values: np.ndarray) -> None:
    """Copies a part that is not contiguous in the file, some rows at a time; reads nothing between them."""
    step = max(1, _COPIED_BYTES // max(1, source.destination[:1].nbytes))
    for first in range(0, len(values), step):
        piece = source.destination[first : first + step]
        cast_into(piece, values[first : first + step])
        require_finite(piece, source.name)


def _copy(destination: np.ndarray, values: np.ndarray, copying: ctypes.CDLL) -> bool:
    """Copies values of one dtype; returns whether all are finite."""
    bits, exponent = EXPONENTS[destination.dtype]
    call = getattr(copying, f"moe_jax_copy_{8 * destination.itemsize}")
    call.restype = ctypes.c_bool
    number = np.ctypeslib.as_ctypes_type(bits)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (destination, values))
    return call(*pointers, ctypes.c_int64(destination.size), number(exponent))


def _fill_scaled(source: Source, values: np.ndarray, files: Mapping[pathlib.Path, np.ndarray]) -> None:
    """Dequantises a tensor; of a part, all columns of its rows are read, since parts do not align with blocks."""
    shape = source.stored.shape
    scale = _values(source.scale, files).reshape(source.scale.shape).astype(np.float32)
    begin, end = _rows_of_part(source) if source.part else (0, shape[0])
    whole = np.empty((end - begin, shape[1]), source.destination.dtype) if source.part else source.destination
    whole, rows = whole.reshape(-1, shape[1]), values.reshape(shape)
    step = max(1, _CHECKED_BYTES // (4 * max(1, shape[1])))
    for first in range(begin, end, step):
        last = min(first + step, end)
        piece = whole[first - begin : last - begin]
        cast_into(piece, dequantize(rows[first:last], scale, source.blocks, first))
        require_finite(piece, source.name)
    if source.part:
        outer, *inner = source.part
        source.destination[...] = whole.reshape(outer.stop - outer.start, *source.seen_as[1:])[:, *inner]


def _fill_quantized(source: QuantizedSource, files: Mapping[pathlib.Path, np.ndarray]) -> None:
    """Fills values and scales: as stored, if they are in this dtype, otherwise quantised some rows at a time."""
    values, shape = _values(source.stored, files), source.seen_as[-2:]
    if values.size != math.prod(source.seen_as):
        raise ValueError(f"tensor {source.name} has {values.size} values: expected {math.prod(source.seen_as)}")
    *outer, rows, columns = source.part
    stored_scale = None
    if source.scale is not None:
        stored_scale = _values(source.scale, files).reshape(source.scale.shape).astype(np.float32)
    as_stored = values.dtype == source.destination.dtype
    block = source.block
    step = max(1, _CHECKED_BYTES // (4 * block[0] * shape[1])) * block[0]
    matrices, even = values.reshape(source.seen_as), quantized.even_block(block, *shape)
    cut = tuple(blocks_of_part(*one) for one in zip((rows, columns), even, shape))
    for place in np.ndindex(source.destination.shape[:-2]):
        matrix = matrices[tuple(first + one.start for first, one in zip(place, outer))]
        scale = stored_scale if as_stored else np.empty(block.scale_shape(shape), np.float32)
        for first in range(rows.start // block[0] * block[0], rows.stop, step):
            last = min(first + step, shape[0])
            if as_stored:
                piece = matrix[first:last]
                require_finite(np.ascontiguousarray(piece), source.name)
            else:
                wide = matrix[first:last].astype(np.float32)
                if stored_scale is not None:
                    wide = dequantize(matrix[first:last], stored_scale, source.blocks, first)
                piece, own_scale = quantized.quantize(wide, source.destination.dtype.name, block)
                scale[first // block[0] : first // block[0] + len(own_scale)] = own_scale
            low, high = max(first, rows.start), min(last, rows.stop)
            source.destination[place][low - rows.start : high - rows.start] = piece[low - first : high - first, columns]
        spread = quantized.spread(scale, block, shape, even)[cut]
        if not np.isfinite(spread).all():
            raise ValueError(f"tensor {source.name} holds NaN or infinity")
        source.scale_destination[place] = spread


def blocks_of_part(part: slice, block: int, size: int) -> slice:
    """The blocks along an axis that hold a part of it, which begins and ends with a block unless there is only one."""
    return slice(0, 1) if block == size else slice(part.start // block, part.stop // block)


def _rows_of_part(source: Source) -> tuple[int, int]:
    """The rows of a matrix that hold a part of it: `seen_as` splits its rows, or its columns, into more dimensions."""
    rows_each = source.stored.shape[0] // source.seen_as[0]
    return source.part[0].start * rows_each, source.part[0].stop * rows_each


def _values(stored: StoredTensor, files: Mapping[pathlib.Path, np.ndarray]) -> np.ndarray:
    raw = files[stored.path][stored.start : stored.start + stored.nbytes]
    if raw.size < stored.nbytes:
        raise ValueError(f"{stored.path} is truncated: it is shorter than its table says")
    return raw.view(stored.dtype)


def _buffer(name: str, size: int) -> np.ndarray:
    """A buffer of this thread, reused so that it stays in the cache."""
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:size]
