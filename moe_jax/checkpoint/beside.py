"""What a model's folder holds beside its weights: fields of its configuration, its tokenizer, and other small files."""

import json
import os
import pathlib
from typing import NamedTuple

from moe_jax.checkpoint.tables import read_json
from moe_jax.text.tokenizer import read_tokenizer_files

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
    files: dict[str, bytes]  # of the tokenizer, by name


def read_beside(folder: str | os.PathLike) -> Beside:
    """Reads what is to be written again with a model; ValueError where a file is damaged."""
    folder = pathlib.Path(folder)
    model_type = read_json(folder / "config.json")["model_type"]
    return Beside(model_type, read_token_ids(folder), read_tokenizer_files(folder))
