"""What a model's folder holds beside its weights: fields of its configuration, its tokenizer, and other small files."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from absl import logging

from moe_jax.checkpoint.tables import read_json
from moe_jax.routing import calibration

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST_BYTES = 100_000_000  # of a file that is no weights: a tokenizer has a fifth of that
_WRITTEN = ("config.json", "generation_config.json", "params.json")  # from the fields and the weights
_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npy"),
)
_PAGES = (".md", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf")
_TEMPLATES = "additional_chat_templates"  # a folder of transformers 5


def read_token_ids(folder: str | os.PathLike) -> dict[str, int | list[int]]:
    """Reads `bos_token_id`, `eos_token_id` and `pad_token_id`, where given: those of `generation_config.json` win.

    Raises:
        ValueError: a file is damaged, or what it gives is neither an integer nor a list of them.
    """
    folder = pathlib.Path(folder)
    fields = read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        fields |= {name: x for name, x in read_json(folder / "generation_config.json").items() if x is not None}
    token_ids = {name: fields[name] for name in TOKEN_IDS if fields.get(name) is not None}
    for name, ids in token_ids.items():
        if not all(type(one) is int for one in (ids if isinstance(ids, list) else [ids])):
            raise ValueError(f"{folder}: {name} = {json.dumps(ids)[:100]}: wanted an integer, or a list of them")
    return token_ids


class Beside(NamedTuple):
    """What a model's folder holds beside its shape and weights."""

    model_type: str
    token_ids: dict[str, int | list[int]]
    files: dict[str, bytes]  # by name: of the tokenizer, and every other small one
    config: dict[str, Any] = {}  # of config.json, all fields
    generation_config: dict[str, Any] = {}  # of generation_config.json

    def options(self) -> dict[str, Any]:
        """The arguments of `huggingface.write_checkpoint` that write it all again."""
        fields = self._asdict()
        return fields | {"extra_files": fields.pop("files")}

    def without_calibration(self) -> "Beside":
        """What is left where another number of experts is the model's own, or its routers have changed."""
        return self._replace(files={name: data for name, data in self.files.items() if name != calibration.NAME})

    def of_other_weights(self) -> "Beside":
        """What is left where the weights are new: no measurement of the old ones, and no page or picture about them."""
        files = self.without_calibration().files
        return self._replace(files={name: data for name, data in files.items() if not name.endswith(_PAGES)})


def read_beside(folder: str | os.PathLike) -> Beside:
    """Reads what is to be written again with a model; ValueError where a file is damaged."""
    folder = pathlib.Path(folder)
    config, generation = folder / "config.json", folder / "generation_config.json"
    fields = read_json(config)
    return Beside(
        fields["model_type"],
        read_token_ids(folder),
        _read_files(folder),
        fields,
        read_json(generation) if generation.exists() else {},
    )


def _read_files(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but hidden ones, weights and what is written anew, by their path within the folder."""
    found = {}
    for path in sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".") or name in _WRITTEN or name.endswith(_WEIGHTS):
            continue
        if path.stat().st_size > LARGEST_BYTES:
            logging.warning(
                "%s is left behind where the model is saved: it has more than %d bytes", path, LARGEST_BYTES
            )
            continue
        found[name] = path.read_bytes()
    return found
