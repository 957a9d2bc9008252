"""The safetensors format: a JSON table of names, dtypes, shapes and offsets, then the bytes.

The format's own library needs a second copy of the model to read or write it. This module reads tables, whose tensors
`filling` copies directly to their places, and writes files tensor by tensor.
"""

import hashlib
import json
import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
FLOATS = frozenset(_DTYPES.values())
# Not weights: tables hold such tensors, so that a message can name them.
_INTEGERS = {
    **{"BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I16": np.dtype(np.int16)},
    **{"U16": np.dtype(np.uint16), "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32), "I64": np.dtype(np.int64)},
    "U64": np.dtype(np.uint64),
}
_KNOWN = _DTYPES | _INTEGERS
_CODES = {dtype: code for code, dtype in _KNOWN.items()}
_MAX_TABLE_BYTES = 100_000_000  # the library's own limit


class StoredTensor(NamedTuple):
    """The location of one tensor: `start` counts bytes from the beginning of the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def code(self) -> str:
        """The format's name for its dtype."""
        return _CODES[self.dtype]

    def require_float(self, name: str) -> None:
        """Raises ValueError if it holds integers, which are not weights."""
        if self.dtype not in FLOATS:
            raise ValueError(
                f"{self.path}: tensor {name} is stored as {self.code}: expected one of {', '.join(_DTYPES)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_table(path: Path) -> dict[str, StoredTensor]:
    """Reads the table of a file and checks it against the file's length.

    Raises:
        ValueError: the file cannot be read or is truncated, its table is damaged (a name twice, gaps or overlaps), or
            a tensor has a dtype other than F32, F16, BF16, F8_E4M3 and integers. Damaged values go unnoticed: the
            format has no checksums.
    """
    try:
        file_bytes, table_bytes, text = _read_head(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text, object_pairs_hook=_refuse_repeated_names)
        entries.pop("__metadata__", None)
        spans = {name: _parsed(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged table of tensors: {_briefly(error)}") from error
    end = max((last for _, last, _, _ in spans.values()), default=0)
    if 8 + table_bytes + end != file_bytes:
        raise ValueError(
            f"{path} is truncated or damaged: its table needs {8 + table_bytes + end} bytes, it has {file_bytes}"
        )
    table, before = {}, 0
    for name, (first, last, code, shape) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if code not in _KNOWN:
            raise ValueError(f"{path}: tensor {name} is stored as {code}: expected one of {', '.join(_DTYPES)}")
        if min((first, *shape)) < 0 or last - first != math.prod(shape) * _KNOWN[code].itemsize:
            raise ValueError(f"{path} has a damaged table: {name} takes {last - first} bytes for {list(shape)} {code}")
        if first != before:
            raise ValueError(f"{path} has a damaged table: {name} begins at {first}: expected {before}, where one ends")
        before = last
        table[name] = StoredTensor(path, _KNOWN[code], shape, 8 + table_bytes + first)
    return table


def _read_head(path: Path) -> tuple[int, int, bytes]:
    """Returns the sizes of file and table, and the table's text."""
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        table_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or table_bytes > min(file_bytes - 8, _MAX_TABLE_BYTES):
            raise ValueError(f"{path} is truncated, or not a safetensors file: {file_bytes} bytes")
        return file_bytes, table_bytes, file.read(table_bytes)


def _refuse_repeated_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"{next(name for name, value in pairs if fields[name] is not value)} appears twice")
    return fields


def _briefly(error: Exception) -> str:
    text = repr(error)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _parsed(entry: dict) -> tuple[int, int, str, tuple[int, ...]]:
    first, last = map(operator.index, entry["data_offsets"])
    return first, last, str(entry["dtype"]), tuple(map(operator.index, entry["shape"]))


def head_sha256(path: Path) -> str:
    """A digest of everything before the values: the table and its size."""
    _, table_bytes, text = _read_head(path)
    return hashlib.sha256(table_bytes.to_bytes(8, "little") + text).hexdigest()


def write_file(
    path: Path,
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    alignment_bytes: int = 8,
) -> None:
    """Writes a new file.

    Args:
        path: the file, which must not exist.
        shapes: the dtype and shape of each tensor, in the order of the file.
        tensors: contiguous arrays, in that order.
        alignment_bytes: the first tensor begins at a multiple of this.
    """
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, (dtype, shape) in shapes.items():
        first, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment_bytes)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}: expected {dtype} {shape}")
            file.write(tensor.reshape(-1).view(np.uint8).data if tensor.size else b"")
