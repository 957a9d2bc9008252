"""A training run of a few seconds, alike in structure to real ones, for tests of all that can happen to it."""

import json
import lzma
import pathlib
import sysconfig

from moe_jax.text.corpus import ARCHIVE, MANIFEST

MODULES = ("argparse.py", "ast.py", "base64.py", "bdb.py", "calendar.py", "cmd.py", "csv.py", "enum.py", "heapq.py")
SMALL = {
    "decoder.vocab_size": 384,
    "decoder.d_model": 32,
    "decoder.num_layers": 3,
    "decoder.dense_hidden": 48,
    "decoder.max_context": 64,
    "attention.num_heads": 2,
    "attention.num_kv_heads": 1,
    "attention.head_dim": 16,
    "moe.num_experts": 8,
    "moe.k": 3,
    "moe.expert_hidden": 16,
    "text.vocab_size": 384,
    "training.steps": 40,
    "training.batch_size": 4,
    "training.sequence_length": 64,
    "training.warmup_steps": 4,
    "training.checkpoint_every": 5,
    "training.evaluate_every": 20,
    "training.evaluate_bytes": 2000,
    "training.log_every": 1,
    "evaluation.policies": ("model", "topk:1"),
}


def write_sources(folder: pathlib.Path) -> pathlib.Path:
    """Makes a few modules of the standard library the training text, and six files the held-out text."""
    (folder / "train").mkdir(parents=True)
    for name in MODULES:
        (folder / "train" / name).write_bytes((pathlib.Path(sysconfig.get_path("stdlib")) / name).read_bytes())
    whole = pathlib.Path(__file__).parents[1] / "assets" / "text"
    (folder / "held_out").mkdir()
    with lzma.open(whole / ARCHIVE, "rt") as lines, lzma.open(folder / "held_out" / ARCHIVE, "wt") as few:
        few.writelines(next(lines) for _ in range(6))
    manifest = json.loads((whole / MANIFEST).read_text())
    (folder / "held_out" / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"][:6]}))
    return folder


def overrides(sources: pathlib.Path, **more) -> list[str]:
    """What --set takes: the small run on these sources, with some settings changed."""
    folders = {"text.sources": (str(sources / "train"),), "text.held_out": str(sources / "held_out")}
    return [f"{name}={value!r}" for name, value in (SMALL | folders | more).items()]
