"""Fifty ways to damage a model's folder, each with a pattern for its error message.

Not included, since nothing can detect them: a flipped bit that leaves a weight finite (the format has no checksums),
a setting possible (`rope_theta`), or changes the name of an optional setting or the text of a token.
"""

import dataclasses
import json
import os
import pathlib
import random
from collections.abc import Callable

import numpy as np
import safetensors.numpy

WEIGHTS, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
EXPERT = "model.layers.1.mlp.experts.0.down_proj.weight"


@dataclasses.dataclass(frozen=True)
class Damage:
    """A way to damage a folder, and a pattern that the error message matches."""

    name: str
    harm: Callable[[pathlib.Path], object]
    says: str
    sharded: bool = False
    told_by_data: bool = False  # detected by the values of tensors, else before one is read


def shard(folder: pathlib.Path) -> None:
    """Splits the weights into two files and an index."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for file, part in zip(SHARDS, parts, strict=True):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def table_bytes(path: pathlib.Path) -> int:
    """The length of a safetensors table, as stored in the file."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


def truncated(file: str, length: Callable[[pathlib.Path], int]):
    """Cuts a file off."""
    return lambda folder: os.truncate(folder / file, length(folder / file))


def flipped(file: str, position: Callable[[bytes], int], bit: int = 4):
    """Flips one bit of one byte."""

    def harm(folder):
        data = bytearray((folder / file).read_bytes())
        data[position(data)] ^= 1 << bit
        (folder / file).write_bytes(data)

    return harm


def in_table(seed: int):
    """Flips a bit of the table, after the metadata, which no program reads."""

    def harm(folder):
        data = bytearray((folder / WEIGHTS).read_bytes())
        chosen = random.Random(seed)
        data[chosen.randrange(data.index(b"}") + 2, 8 + table_bytes(folder / WEIGHTS))] ^= 1 << chosen.randrange(8)
        (folder / WEIGHTS).write_bytes(data)

    return harm


def retabled(change: Callable[[dict], object], file: str = WEIGHTS):
    """Rewrites the table of a file; the data stay the same."""

    def harm(folder):
        data, size = (folder / file).read_bytes(), table_bytes(folder / file)
        entries = json.loads(data[8 : 8 + size])
        text = json.dumps(change(entries) or entries).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return harm


def twice(folder: pathlib.Path) -> None:
    """Lists one tensor twice in an otherwise valid table."""
    data, size = (folder / WEIGHTS).read_bytes(), table_bytes(folder / WEIGHTS)
    table = data[8 : 8 + size].rstrip()
    entry = json.dumps({"model.norm.weight": json.loads(table)["model.norm.weight"]})[1:]
    text = table[:-1] + b"," + entry.encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def rewritten(change: Callable[[dict], object], file: str = WEIGHTS):
    """Saves other tensors, in a valid file."""

    def harm(folder):
        tensors = safetensors.numpy.load_file(folder / file)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})

    return harm


def configured(file: str = CONFIG, **fields):
    """Changes fields of a JSON file."""

    def harm(folder):
        given = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(given | fields))

    return harm


def value(number: float, position: int = 5):
    """Makes one weight NaN or infinite."""

    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].copy()
        tensors[EXPERT].flat[position] = number

    return rewritten(change)


def replaced(file: str, make: Callable[[pathlib.Path], object]):
    """Replaces a file by something else."""

    def harm(folder):
        (folder / file).unlink()
        make(folder / file)

    return harm


def _exponent(folder: pathlib.Path) -> None:
    """Sets all eight exponent bits of one float, in the file."""
    entries = json.loads((folder / WEIGHTS).read_bytes()[8 : 8 + table_bytes(folder / WEIGHTS)])
    first = 8 + table_bytes(folder / WEIGHTS) + entries["model.norm.weight"]["data_offsets"][0]
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[first + 2] |= 0x80
    data[first + 3] |= 0x7F
    (folder / WEIGHTS).write_bytes(data)


def _overlapping(entries: dict) -> None:
    """Two tensors of one size at the same offset, and a gap in place of one of them."""
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (3, 4)]
    entries[names[0]]["data_offsets"] = entries[names[1]]["data_offsets"]


def _beyond(entries: dict) -> None:
    entries[EXPERT]["data_offsets"] = [offset + 10**9 for offset in entries[EXPERT]["data_offsets"]]


def _indexed(change: Callable[[dict], object]):
    def harm(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return harm


def _sparse(folder: pathlib.Path) -> None:
    """A sparse file of a terabyte, whose first bytes give that length for the table."""
    with open(folder / WEIGHTS, "wb") as file:
        file.write((10**12 - 8).to_bytes(8, "little"))
        file.truncate(10**12)


def _deep(folder: pathlib.Path) -> None:
    text = b"[" * 100_000
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)


def _looped(path: pathlib.Path) -> None:
    path.symlink_to(path.name)


DAMAGES = [
    Damage("weights cut within the length", truncated(WEIGHTS, lambda path: 5), "truncated, or not a safetensors"),
    Damage("weights cut within the table", truncated(WEIGHTS, lambda path: 8 + table_bytes(path) // 2), "truncated"),
    Damage("weights cut after the table", truncated(WEIGHTS, lambda path: 8 + table_bytes(path)), "truncated"),
    Damage("weights cut within the data", truncated(WEIGHTS, lambda path: path.stat().st_size // 2), "truncated"),
    Damage("weights without the last byte", truncated(WEIGHTS, lambda path: path.stat().st_size - 1), "truncated"),
    Damage("weights empty", truncated(WEIGHTS, lambda path: 0), "truncated.*: 0 bytes"),
    Damage("a bit of the length", flipped(WEIGHTS, lambda data: 1), WEIGHTS),
    Damage("the highest bit of the length", flipped(WEIGHTS, lambda data: 7, 7), "truncated, or not"),
    *(Damage(f"a bit of the table, {seed}", in_table(seed), "tiny") for seed in range(6)),
    Damage("a table of a terabyte", _sparse, "truncated, or not a safetensors file"),
    Damage("a table of brackets", _deep, "damaged table"),
    Damage("a name twice", twice, r"model\.norm\.weight appears twice"),
    Damage("tensors that overlap", retabled(_overlapping), "begins at"),
    Damage("offsets beyond the file", retabled(_beyond), "truncated or damaged: its table needs"),
    Damage("offsets below zero", retabled(lambda t: t[EXPERT].update(data_offsets=[-4, 0])), "damaged table"),
    Damage("a shape of floats", retabled(lambda t: t[EXPERT].update(shape=[64.0, 24.0])), "damaged table"),
    Damage("a shape of 2**70", retabled(lambda t: t[EXPERT].update(shape=[2**35, 2**35])), "damaged table"),
    Damage(
        "a dtype of its own", retabled(lambda t: t[EXPERT].update(dtype="F31")), "stored as F31: expected one of F32"
    ),
    Damage("a table that is a list", retabled(lambda t: [t]), "damaged table"),
    Damage(
        "a tensor transposed",
        rewritten(lambda tensors: tensors.update({EXPERT: np.ascontiguousarray(tensors[EXPERT].T)})),
        rf"{EXPERT} has shape \(24, 64\): config.json asks for \(64, 24\)",
    ),
    Damage("a tensor missing", rewritten(lambda tensors: tensors.pop(EXPERT)), f"1 missing: {EXPERT}"),
    Damage("a tensor too many", rewritten(lambda t: t.update(extra=np.ones(3, np.float32))), "1 unknown: extra"),
    Damage(
        "a tensor of integers", rewritten(lambda t: t.update({EXPERT: t[EXPERT].astype(np.int32)})), "stored as I32"
    ),
    Damage("NaN", value(float("nan")), f"tensor {EXPERT} holds NaN", told_by_data=True),
    Damage("infinity", value(float("-inf"), -1), f"tensor {EXPERT} holds NaN or infinity", told_by_data=True),
    Damage("an exponent's bits", _exponent, r"tensor model\.norm\.weight holds NaN", told_by_data=True),
    Damage("weights that are a loop of links", replaced(WEIGHTS, _looped), "neither model.safetensors nor"),
    Damage("weights that never end", replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "neither"),
    Damage("weights that are a pipe", replaced(WEIGHTS, os.mkfifo), "neither"),
    Damage("config.json cut", truncated(CONFIG, lambda path: 100), "config.json is not JSON"),
    Damage("config.json empty", truncated(CONFIG, lambda path: 0), "config.json is not JSON"),
    Damage(
        "a bit of config.json", flipped(CONFIG, lambda data: data.index(b'"hidden_size"') + 3), "hidden_size is miss"
    ),
    Damage("config.json is a folder", replaced(CONFIG, pathlib.Path.mkdir), "has no config.json"),
    Damage("config.json of brackets", lambda f: (f / CONFIG).write_text("[" * 10**5), "config.json is not JSON"),
    Damage("a width of another model", configured(hidden_size=128), r"has shape .*: config.json asks for"),
    Damage("a width below zero", configured(hidden_size=-64), "decoder.d_model = -64: expected a positive number"),
    Damage("a width in words", configured(hidden_size="sixty-four"), 'hidden_size = "sixty-four": expected int'),
    Damage("another architecture", configured(model_type="mamba"), 'model_type = "mamba": supported: .*glm4_moe'),
    Damage("more active experts than there are", configured(num_experts_per_tok=17), "moe.k = 17: expected at most"),
    Damage("groups that do not divide the experts", configured(n_group=3), "moe.num_groups = 3: expected a divisor"),
    Damage("fewer layers than tensors say", configured(num_hidden_layers=2), "unknown: model.layers.2"),
    Damage("more layers than there are", configured(num_hidden_layers=4), "missing: model.layers.3"),
    Damage("eight bits of another kind", configured(quantization_config={"quant_method": "awq"}), "awq"),
    Damage("a billion experts", configured(n_routed_experts=10**9), r"holds \d+ tensors: config.json asks for \d+"),
    Damage(
        "a billion further layers", configured(num_nextn_predict_layers=10**9), "num_nextn_predict_layers = 10000000"
    ),
    Damage("layer types of another kind", configured(layer_types=[["full_attention"]]), "layer_types"),
    Damage("an end of text in words", configured("generation_config.json", eos_token_id=["end"]), "eos_token_id"),
    Damage("tokenizer.json cut", truncated(TOKENIZER, lambda path: path.stat().st_size // 2), "is not a tokenizer"),
    Damage("a bit of tokenizer.json", flipped(TOKENIZER, lambda data: 0), "is not a tokenizer"),
    Damage("a shard missing", lambda f: (f / SHARDS[1]).unlink(), "is missing: .* names it", sharded=True),
    Damage("a shard that is a folder", replaced(SHARDS[0], pathlib.Path.mkdir), "is missing: .* names", sharded=True),
    Damage("a shard cut", truncated(SHARDS[1], lambda path: path.stat().st_size - 9), "truncated", sharded=True),
    Damage(
        "a shard twice", lambda f: (f / SHARDS[1]).write_bytes((f / SHARDS[0]).read_bytes()), "also in", sharded=True
    ),
    Damage("the index cut", truncated(INDEX, lambda path: 99), "is not JSON", sharded=True),
    Damage(
        "a bit of the index", flipped(INDEX, lambda data: data.index(b"norm")), "which does not hold it", sharded=True
    ),
    Damage("an index without a map", configured(INDEX, weight_map=[1]), "has no weight_map", sharded=True),
    Damage("an index to elsewhere", _indexed(lambda m: m.update({EXPERT: "../x"})), "is missing", sharded=True),
    Damage(
        "an index with a name too many",
        _indexed(lambda m: m.update(x=SHARDS[0])),
        "which does not hold it",
        sharded=True,
    ),
]
