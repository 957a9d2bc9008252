"""The stacked layout: each parameter is one tensor, stored as it is used in memory, so that a model can be mapped.

`stacked.safetensors` holds the parameters by their paths. Each begins at a multiple of 64 bytes, so that JAX can use
the memory without copying it; as the format has no gaps, padding is a tensor too. `stacked.json` records the length of
that file and a digest of everything before its values. Values are checked to be finite when they are written, and not
again when they are read. The folder has all other files of a model as well.
"""

import collections
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.checkpoint import filling, huggingface, safetensors_file
from moe_jax.checkpoint.reading import Piece, Stack
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.checkpoint.tables import INDEX, WEIGHTS, read_json
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import DTYPES
from moe_jax.files import replaced_folder
from moe_jax.kernels.quantized import Quantized
from moe_jax.model import parameters
from moe_jax.model.sharding import on_host

STACKS, WRITTEN = "stacked.safetensors", "stacked.json"
_FORMAT = 1
_ALIGNMENT_BYTES = 64
_GAP = "gap."  # prefix of the names of padding


def is_stacked(folder: pathlib.Path) -> bool:
    """Whether a folder was written by `write`; ValueError if it has weights in another layout as well."""
    if not (folder / STACKS).exists() and not (folder / WRITTEN).exists():
        return False
    if other := [name for name in (WEIGHTS, INDEX) if (folder / name).exists()]:
        raise ValueError(f"{folder} holds both {STACKS} and {other[0]}: expected one of them")
    return True


def read_table(folder: pathlib.Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """The locations of the parameters of a stacked folder, by their paths.

    Raises:
        ValueError: the file has another length or table than was written, or does not hold the parameters of the
            architecture.
    """
    path = folder / STACKS
    written = read_json(folder / WRITTEN)
    if written.get("format") != _FORMAT:
        raise ValueError(f"{folder / WRITTEN}: format = {written.get('format')!r}: expected {_FORMAT}")
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected it beside {WRITTEN}")
    if (file_bytes := path.stat().st_size) != written.get("bytes"):
        raise ValueError(f"{path} has {file_bytes} bytes: expected {written.get('bytes')!r}, as were written")
    table = safetensors_file.read_table(path)
    if safetensors_file.head_sha256(path) != written.get("head_sha256"):
        raise ValueError(f"{path} has another table than was written: expected the file unchanged")
    found = {name: tensor for name, tensor in table.items() if not name.startswith(_GAP)}
    expected = {parameter.path: parameter.shape(architecture) for parameter in parameters.of(architecture)}
    huggingface.require_same_names(folder, set(expected), set(found))
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise ValueError(f"{path}: {name} has shape {tensor.shape}: config.json asks for {expected[name]}")
        if tensor.dtype not in filling.EXPONENTS or tensor.start % _ALIGNMENT_BYTES:
            raise ValueError(f"{path}: {name} is {tensor.code} at byte {tensor.start}: this cannot be mapped")
    return found


def stacks_of(table: Mapping[str, StoredTensor], architecture: Architecture, dtype: str) -> list[Stack]:
    """The location of every parameter, as `huggingface.stacks_of` gives it; dtype "auto": each as stored."""
    stacks = []
    for parameter in parameters.of(architecture):
        stored, shape = table[parameter.path], parameter.shape(architecture)
        expected = stored.dtype if dtype == "auto" else parameter_dtype(parameter, dtype)
        piece = Piece(parameter.path, (slice(None),) * len(shape), stored)
        halved_itemsize = parameter_dtype(parameter, "bfloat16").itemsize
        stacks.append(Stack(parameter.path, shape, expected, (piece,), expected == stored.dtype, halved_itemsize))
    return stacks


def parameter_dtype(parameter: parameters.Parameter, dtype: str) -> np.dtype:
    """The dtype of a parameter in a model of this dtype: a selection bias stays in float32."""
    return np.dtype(np.float32 if parameter.kind is parameters.SelectionBias else dtype)


def in_dtype(params: Mapping[str, Any], architecture: Architecture, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every parameter with its path, in host memory, converted to a dtype; "auto": as it is.

    Raises:
        ValueError: a parameter is not finite in that dtype.
    """
    arrays = dict(huggingface.flattened(params))
    for path, expected in dtypes_of(params, architecture, dtype).items():
        given = on_host(arrays[path])
        if given.dtype != expected:
            values, given = given, filling.allocate(given.shape, expected)
            filling.cast_into(given, values)
        filling.require_finite(given, path)
        yield path, given


def dtypes_of(params: Mapping[str, Any], architecture: Architecture, dtype: str) -> dict[str, np.dtype]:
    """The dtype in which each parameter is written, by its path; "auto": as it is.

    Raises:
        ValueError: a parameter is missing, unknown, of another shape, or of a dtype that a model cannot have.
    """
    huggingface.require_dtype(dtype)
    arrays, dtypes = dict(huggingface.flattened(params)), {}
    table = {parameter.path: parameter for parameter in parameters.of(architecture)}
    if differing := sorted(table.keys() ^ arrays.keys()):
        raise ValueError(f"params: {differing[0]} is {'missing' if differing[0] in table else 'unknown'}")
    for path, parameter in table.items():
        if arrays[path].shape != (expected := parameter.shape(architecture)):
            raise ValueError(f"parameter {path} has shape {arrays[path].shape}: the architecture asks for {expected}")
        if isinstance(arrays[path], Quantized):
            raise ValueError(
                f"parameter {path} is in eight bits, which only the layout of Hugging Face holds: expected that, or "
                "model.expert_dtype=model"
            )
        dtypes[path] = np.dtype(arrays[path].dtype) if dtype == "auto" else parameter_dtype(parameter, dtype)
        if dtypes[path] not in filling.EXPONENTS:
            raise ValueError(f"parameter {path} is {dtypes[path].name}: expected one of {', '.join(DTYPES[1:])}")
    return dtypes


def write(
    folder: str | os.PathLike,
    architecture: Architecture,
    params: Mapping[str, Any],
    texts_of: Callable[[np.dtype], Mapping[str, str]],
    files: Mapping[str, bytes],
    *,
    dtype: str = "auto",
    replace: bool = False,
) -> None:
    """Writes a stacked folder; it appears whole, or not at all.

    Args:
        folder: the new folder; it must not exist yet, or be empty.
        architecture: the model's architecture.
        params: a nested dict of arrays.
        texts_of: gives config.json and generation_config.json for the dtype of most numbers.
        files: other files to write, by name.
        dtype: the dtype of every parameter but a selection bias; "auto": as it is.
        replace: whether to replace an existing folder, with everything in it.

    Raises:
        ValueError: the folder is taken, the parameters are not those of the architecture, or one is not finite.
    """
    folder = pathlib.Path(folder)
    huggingface.require_free(folder, replace)
    shapes: dict[str, huggingface.TypeAndShape] = {}
    sizes: dict[np.dtype, int] = collections.Counter()
    for path, expected in dtypes_of(params, architecture, dtype).items():
        shape = parameters.find([path]).shape(architecture)
        shapes[path] = (expected, shape)
        sizes[expected] += math.prod(shape)
        if gap := -math.prod(shape) * expected.itemsize % _ALIGNMENT_BYTES:
            shapes[f"{_GAP}{len(shapes)}"] = (np.dtype(np.uint8), (gap,))
    values = in_dtype(params, architecture, dtype)
    tensors = (
        np.zeros(shape, stored) if name.startswith(_GAP) else next(values)[1]
        for name, (stored, shape) in shapes.items()
    )
    with replaced_folder(folder) as partial:
        huggingface.write_files(partial, {**texts_of(max(sizes, key=sizes.get)), **files})
        safetensors_file.write_file(partial / STACKS, shapes, tensors, _ALIGNMENT_BYTES)
        written = {
            "format": _FORMAT,
            "bytes": (partial / STACKS).stat().st_size,
            "head_sha256": safetensors_file.head_sha256(partial / STACKS),
        }
        huggingface.write_files(partial, {WRITTEN: json.dumps(written, indent=2) + "\n"})
