"""The files of a model's folder beside its weights: token ids, tokenizer, and other small files."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from moe_jax.routing import calibration

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST_BYTES = 100_000_000  # of a file without weights; a tokenizer has a fifth of that
# files that saving writes itself, or that describe how weights are stored
_WRITTEN = ("config.json", "generation_config.json", "params.json", "stacked.json")
_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npy"),
)
_PAGES = (".md", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf")
_TEMPLATES = "additional_chat_templates"  # a folder of transformers 5


def token_ids_of(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, where given; `generation_config.json` takes precedence.

    Raises:
        ValueError: one is neither an id, which is -1 in some published files for none, nor a list of them.
    """
    fields = {**config, **{name: x for name, x in generation_config.items() if x is not None}}
    token_ids = {name: fields[name] for name in TOKEN_IDS if fields.get(name) is not None}
    for name, ids in token_ids.items():
        if not all(type(one) is int and -1 <= one < 2**31 for one in (ids if isinstance(ids, list) else [ids])):
            raise ValueError(f"{name} = {json.dumps(ids)[:100]}: expected an integer, or a list of them")
    return token_ids


def read_files(folder: pathlib.Path) -> dict[str, bytes]:
    """Reads all files but hidden ones, weights and those that saving writes itself, by path within the folder."""
    found = {}
    for path in sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".") or name in _WRITTEN or name.endswith(_WEIGHTS):
            continue
        if path.stat().st_size > LARGEST_BYTES:
            logging.warning("%s has more than %d bytes: it is not copied when the model is saved", path, LARGEST_BYTES)
            continue
        found[name] = path.read_bytes()
    return found


def without_calibration(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files without the calibration, for a model with another number of active experts or other routers."""
    return {name: data for name, data in files.items() if name != calibration.NAME}


def without_pages(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files without pages and pictures, which describe the old weights, for a model with new weights."""
    return {name: data for name, data in files.items() if not name.endswith(_PAGES)}
