"""Reads the JSON files of a checkpoint's folder, and the tables of its weight files."""

import json
import pathlib
from typing import Any

from moe_jax.checkpoint import safetensors_file
from moe_jax.checkpoint.safetensors_file import StoredTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYOUT = (
    "a checkpoint folder in Hugging Face layout: config.json beside model.safetensors or its shards and their index"
)


def read_json(path: pathlib.Path, setting: str = "model.path") -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint, which `setting` names.

    Raises:
        ValueError: it is missing or damaged.
    """
    folder = path.parent
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{setting} = {str(folder)!r} {what}: expected {LAYOUT}")
    if not path.is_file():
        raise ValueError(f"{setting} = {str(folder)!r} has no {path.name}: expected {LAYOUT}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}: expected an object")
    return fields


def read_tables(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Reads the tables of all weight files: of the single file if there is one, else of the shards in the index."""
    if (folder / WEIGHTS).is_file():
        return safetensors_file.read_table(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(f"model.path = {str(folder)!r} has neither {WEIGHTS} nor {INDEX}: expected {LAYOUT}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
    tables: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard} is missing: {INDEX} names it")
        table = safetensors_file.read_table(folder / shard)
        if twice := sorted(tables.keys() & table.keys()):
            raise ValueError(f"{folder / shard}: {twice[0]} is also in {tables[twice[0]].path.name}")
        tables |= table
    for name, shard in weight_map.items():
        if name not in tables or tables[name].path.name != shard:
            raise ValueError(f"{folder / INDEX} lists {name} in {shard}, which does not hold it")
    return tables
