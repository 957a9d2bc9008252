"""The folder layout of Hugging Face: `config.json` beside `model.safetensors`, one tensor per layer and expert.

Parameters are a nested dict of stacked arrays; `names.Rule` maps them to tensors. Tensors are read directly into those
arrays and written directly from them, so a model is never in memory twice.
"""

import collections
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from moe_jax.checkpoint import eight_bits, families, filling, layouts, redundant, safetensors_file
from moe_jax.checkpoint.beside import TOKEN_IDS
from moe_jax.checkpoint.families import Family, base, family_of
from moe_jax.checkpoint.names import Rule
from moe_jax.checkpoint.quantization import FLOAT8, SCALE_SUFFIX, Blocks, blocks_of, config_of, take_scales
from moe_jax.checkpoint.reading import Piece, Stack
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.checkpoint.tables import INDEX, WEIGHTS, read_tables
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import DTYPES
from moe_jax.files import is_first, replaced_folder
from moe_jax.kernels import quantized
from moe_jax.kernels.quantized import Quantized
from moe_jax.model.sharding import layer_on_host, on_host

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 5_000_000_000  # of one file, as in transformers
TypeAndShape = tuple[np.dtype, tuple[int, ...]]
_NOT_WRITTEN = ("quantization_config", "compression_config", *base.OF_LAYERS)  # fields about the weights as stored


def describe(fields: dict[str, Any]) -> tuple[Family, Architecture]:
    """The family and architecture that `config.json` describes.

    Raises:
        ValueError: the family is not supported, or a field asks for something that is not implemented; the message
            names it.
    """
    family = family_of(fields)
    blocks_of(fields)
    architecture = family.architecture({**fields, "quantization_config": None})
    return family, base.with_numbers_of_layers(architecture, fields)


def stacks_of(
    folder: pathlib.Path,
    fields: dict[str, Any],
    family: Family,
    architecture: Architecture,
    dtype: str,
    expert_dtype: str = "model",
) -> list[Stack]:
    """The location of every parameter of a model in its files.

    Args:
        folder: the model's folder.
        fields: of its `config.json`.
        family: as `describe` gives it.
        architecture: as `describe` gives it.
        dtype: the dtype of every parameter but those that their family keeps in float32 (the router's selection bias).
            "auto": the most common dtype of the checkpoint (bfloat16 if that has eight bits) for a parameter whose
            tensors all have it, else float32. Nothing is rounded; the decoder runs weights of both, see
            `model.dtypes.dtype_of`.
        expert_dtype: of the routed experts, as `Checkpoint.load` takes it.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not of floats, or a file is truncated.
    """
    stored = layouts.with_published_names(folder, read_tables(folder))
    scales = take_scales(stored, blocks_of(fields))
    rules = layouts.rules_of(folder, family.rules(architecture), architecture, stored)
    _require_enough(folder, rules, architecture, len(stored))
    expected_names, given = _expected_names(rules, architecture), _without_skipped(folder, stored, family, fields)
    given -= redundant.agreeing(folder, sorted(given - expected_names), stored, architecture)
    require_same_names(folder, expected_names, given, stored)
    for rule in rules:
        expected = rule.stored_shape(architecture)
        for name, _ in rule.placements(architecture):
            stored[name].require_float(name)
            if stored[name].shape != expected:
                raise ValueError(layouts.shape_complaint(name, stored[name], expected))
    most = most_common(stored)
    stacks = [
        Stack(
            rule.parameter,
            rule.shape(architecture),
            _dtype_of(rule, dtype, stored, most, architecture),
            tuple(Piece(name, index, stored[name], scales.get(name)) for name, index in rule.placements(architecture)),
            mapped=False,
            halved_itemsize=4 if rule.float32 else 2,
        )
        for rule in rules
    ]
    return eight_bits.with_experts_in(expert_dtype, stacks, blocks_of(fields))


def config_fields(family: Family, architecture: Architecture) -> dict[str, Any]:
    """The fields of `config.json` for an architecture; ValueError names a setting that the family lacks."""
    return family.config_json(architecture) | base.numbers_of_layers_json(architecture)


def config_texts(
    fields: Mapping[str, Any],
    dtype: np.dtype,
    token_ids: Mapping[str, int | list[int]],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
) -> dict[str, str]:
    """The text of `config.json` and of `generation_config.json`.

    Args:
        fields: as `config_fields` gives them.
        dtype: the dtype of most weights.
        token_ids: for both files; in the first, those of `config` take precedence.
        config: more fields, from another `config.json` of the same model, which may be quantised or of another dtype.
        generation_config: more fields of the second.
    """
    kept = {name: value for name, value in config.items() if name not in _NOT_WRITTEN}
    if "torch_dtype" in kept:  # the name in transformers 4
        kept["torch_dtype"] = dtype.name
    missing = {name: ids for name, ids in token_ids.items() if kept.get(name) is None}
    fields = {**kept, **fields, "dtype": dtype.name, **missing}
    return {"config.json": _json_text(fields), "generation_config.json": _json_text({**generation_config, **token_ids})}


def write_checkpoint(
    folder: str | os.PathLike,
    architecture: Architecture,
    params: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    model_type: str = families.OWN.model_type,
    token_ids: Mapping[str, int | list[int]] | None = None,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes | str] | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that transformers and other servers load; it appears whole, or not at all.

    Args:
        folder: where; missing parents are made.
        architecture: its `moe.k` becomes `num_experts_per_tok`.
        params: nested dict of arrays, as `Checkpoint.read` returns it.
        dtype: the dtype of every tensor but those that the family keeps in float32. "auto": as in `params`; experts in
            FP8 are then written as DeepSeek-V3's are.
        model_type: the family whose layout is written.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, for `config.json` and `generation_config.json`.
        config: fields of the `config.json` that the model was read from; kept unless the other arguments set them.
        generation_config: the same for `generation_config.json`.
        extra_files: more files by name, such as `tokenizer.json`.
        replace: whether a folder that is already there is replaced, with everything in it.
        shard_bytes: most bytes of the tensors of one file; a larger tensor gets a file of its own. One file is named
            `model.safetensors`; several have an index.

    Raises:
        ValueError: `folder` is taken, the family cannot express the architecture, or `params` has a parameter missing,
            unknown, of another shape, or not finite in `dtype`, or experts in int8.
    """
    folder = pathlib.Path(folder)
    require_dtype(dtype)
    require_free(folder, replace)
    if unknown := sorted(set(token_ids or {}) - set(TOKEN_IDS)):
        raise ValueError(f"token_ids has {unknown[0]}: expected some of {', '.join(TOKEN_IDS)}")
    family = family_of({"model_type": model_type})
    fields = config_fields(family, architecture)  # first, so that a setting that the family lacks is refused early
    rules = family.rules(architecture)
    arrays = dict(flattened(params))
    require_same_names(folder, {rule.parameter for rule in rules}, set(arrays))
    shapes, dtypes = {}, {}
    blocks = blocks_of(config or {}) or Blocks(*quantized.block_of(quantized.FLOAT8, 0, 0))
    for rule in rules:
        given, expected = arrays[rule.parameter].shape, rule.shape(architecture)
        if given != expected:
            raise ValueError(f"parameter {rule.parameter} has shape {given}: the architecture asks for {expected}")
        dtypes[rule] = _written_dtype(rule, dtype, arrays[rule.parameter])
        stored_shape = rule.stored_shape(architecture)
        for placement in rule.placements(architecture):
            shapes[placement.tensor] = (dtypes[rule], stored_shape)
            if dtypes[rule] == FLOAT8:
                shapes[placement.tensor + SCALE_SUFFIX] = (np.dtype(np.float32), blocks.scale_shape(stored_shape))
    if FLOAT8 in dtypes.values():
        matrices = [name for name, (_, shape) in shapes.items() if name.endswith(".weight") and len(shape) == 2]
        others = sorted(name.removesuffix(".weight") for name in matrices if shapes[name][0] != FLOAT8)
        fields["quantization_config"] = config_of(blocks, others)

    def tensors() -> Iterator[np.ndarray]:
        for rule in rules:
            for name, values in _values_of(rule, arrays[rule.parameter], architecture):
                tensor = np.empty(rule.stored_shape(architecture), dtypes[rule])
                wide = values
                if isinstance(values, Quantized):
                    wide = values.values if dtypes[rule] == FLOAT8 else quantized.wide(values)
                filling.cast_into(tensor, wide.reshape(tensor.shape))
                filling.require_finite(tensor, name)
                yield tensor
                if dtypes[rule] == FLOAT8:
                    yield quantized.spread(values.scale, values.block, tensor.shape, blocks)

    most = most_common({name: StoredTensor(folder, *one, 0) for name, one in shapes.items()})
    texts = config_texts(fields, most, token_ids or {}, config or {}, generation_config or {})
    shards = _shards(shapes, shard_bytes)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        texts[INDEX] = _json_text({"metadata": {"total_size": _bytes_of(shapes)}, "weight_map": weight_map})
    if taken := sorted(set(extra_files or {}) & {*texts, *shards, WEIGHTS, INDEX}):
        raise ValueError(f"extra_files has {taken[0]}, which is written from the architecture and the parameters")
    made = tensors()
    if not is_first():  # it gathers with the first process, which writes
        collections.deque(made, maxlen=0)
        return
    with replaced_folder(folder) as partial:
        write_files(partial, {**texts, **(extra_files or {})})
        for file, names in shards.items():
            part = {name: shapes[name] for name in names}
            safetensors_file.write_file(partial / file, part, itertools.islice(made, len(part)))


def _values_of(rule: Rule, array: Any, architecture: Architecture) -> Iterator[tuple[str, np.ndarray | Quantized]]:
    """The name and values of every tensor of a parameter; a stacked one is in host memory layer by layer."""
    for layer, placements in itertools.groupby(rule.placements(architecture), lambda placement: placement.index[0]):
        is_stacked = isinstance(layer, int)
        parts = (array.values, array.scale) if isinstance(array, Quantized) else (array,)
        parts = [layer_on_host(part, layer) if is_stacked else on_host(part) for part in parts]
        for name, index in placements:
            own = [part[index[1:] if is_stacked else index] for part in parts]
            yield name, Quantized(*own) if isinstance(array, Quantized) else own[0]


def require_free(folder: pathlib.Path, replace: bool = False) -> None:
    """Raises ValueError if something exists at the path of a folder that is to be written."""
    if folder.exists() and not (folder.is_dir() and (replace or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists already, and nothing is overwritten: choose another path")


def write_files(folder: pathlib.Path, files: Mapping[str, bytes | str]) -> None:
    """Writes the files beside the weights; a name may contain one folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def _bytes_of(shapes: Mapping[str, TypeAndShape]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def _shards(shapes: Mapping[str, TypeAndShape], most_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors over files, in order: the names of tensors by file."""
    parts: list[dict[str, TypeAndShape]] = [{}]
    filled_bytes = 0
    for name, one in shapes.items():
        size_bytes = _bytes_of({name: one})
        if parts[-1] and filled_bytes + size_bytes > most_bytes:
            parts.append({})
            filled_bytes = 0
        parts[-1][name] = one
        filled_bytes += size_bytes
    if len(parts) == 1:
        return {WEIGHTS: list(parts[0])}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": list(part) for n, part in enumerate(parts, start=1)}


def _json_text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _expected_names(rules: tuple[Rule, ...], architecture: Architecture) -> set[str]:
    return {placement.tensor for rule in rules for placement in rule.placements(architecture)}


def _require_enough(folder: pathlib.Path, rules: tuple[Rule, ...], architecture: Architecture, given: int) -> None:
    """Refuses an architecture with far more tensors than the files have, before all their names are made."""
    expected = sum(rule.num_tensors(architecture) for rule in rules)
    if expected > 10 * given + 1000:
        raise ValueError(f"{folder} holds {given} tensors: config.json asks for {expected}")


def _without_skipped(folder: pathlib.Path, stored: Mapping, family: Family, fields: dict[str, Any]) -> set[str]:
    """The names of all tensors but those that the family skips, which are logged."""
    names = set(stored)
    for prefix, what in family.skipped(fields):
        skipped = {name for name in names if name.startswith(prefix)}
        if skipped:
            logging.warning("%s: skipped %d tensors of %s* (%s)", folder, len(skipped), prefix, what)
        names -= skipped
    return names


def require_same_names(
    folder: pathlib.Path, expected: set[str], given: set[str], stored: Mapping[str, StoredTensor] | None = None
) -> None:
    """Raises ValueError if tensors or parameters are missing or unknown; `stored` gives dtypes for the message."""

    def shown(name: str) -> str:
        tensor = (stored or {}).get(name)
        return name if tensor is None or tensor.dtype in safetensors_file.FLOATS else f"{name} ({tensor.code})"

    complaints = []
    for what, names in (("missing", sorted(expected - given)), ("unknown", sorted(given - expected))):
        if names:
            some = ", ".join(map(shown, names[:3]))
            complaints.append(f"{len(names)} {what}: {some}{', ...' if len(names) > 3 else ''}")
    if expected - given == {"lm_head.weight"} and not given - expected:
        complaints.append("this is a model without its output head")
    if complaints:
        raise ValueError(f"{folder} does not hold the parameters of its architecture: {'; '.join(complaints)}")


def require_dtype(dtype: str) -> None:
    """Raises ValueError if `dtype` is not a known setting."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")


def _in_memory(dtype: np.dtype) -> np.dtype:
    return _BFLOAT16 if dtype == FLOAT8 else dtype


def most_common(stored: Mapping[str, StoredTensor]) -> np.dtype:
    """The most common dtype, by number of values; those stored in eight bits count as bfloat16."""
    counts: dict[np.dtype, int] = collections.Counter()
    for tensor in stored.values():
        if tensor.dtype in safetensors_file.FLOATS:
            counts[_in_memory(tensor.dtype)] += math.prod(tensor.shape)
    return max(counts, key=counts.get)


def _dtype_of(
    rule: Rule, dtype: str, stored: Mapping[str, StoredTensor], most: np.dtype, architecture: Architecture
) -> np.dtype:
    if rule.float32:
        return np.dtype(np.float32)
    if dtype != "auto":
        return np.dtype(dtype)
    dtypes = {_in_memory(stored[placement.tensor].dtype) for placement in rule.placements(architecture)}
    return most if dtypes == {most} else np.dtype(np.float32)


def _written_dtype(rule: Rule, dtype: str, array: Any) -> np.dtype:
    given = array.values.dtype if isinstance(array, Quantized) else array.dtype
    if dtype == "auto" and isinstance(array, Quantized):
        if given != FLOAT8:
            raise ValueError(
                f"parameter {rule.parameter} is {given.name}, for which the layout has no form: expected a dtype to "
                f"save in, such as bfloat16, or a model with expert_dtype={quantized.FLOAT8}"
            )
        return FLOAT8
    expected = np.dtype(np.float32) if rule.float32 else given if dtype == "auto" else np.dtype(dtype)
    if expected not in filling.EXPONENTS:
        raise ValueError(f"parameter {rule.parameter} is {given.name}: expected one of {', '.join(DTYPES[1:])}")
    return expected


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the arrays of a nested dict with their paths, such as `moe/router/bias_LE`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree
