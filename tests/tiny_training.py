"""A training run of a few seconds, with the structure of real ones, for tests of failures and kills."""

import json
import lzma
import pathlib
import sysconfig

from moe_jax.text.held_out import ARCHIVE, MANIFEST

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
FINETUNING = {
    "policy.spec": "topk:3",
    "training.steps": 12,
    "training.batch_size": 4,
    "training.sequence_length": 32,
    "training.warmup_steps": 2,
    "training.weight_decay": 0.0,
    "training.balance_bias_rate": 0.0,
    "training.balance_loss": 0.0,
    "training.checkpoint_every": 3,
    "training.evaluate_every": 6,
    "training.evaluate_bytes": 2000,
    "training.log_every": 1,
}
TAUGHT = {"objective.language_model": 0.5, "objective.distillation": 0.5, "training.accumulation": 2}


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
    """Overrides for --set: the small run on these sources, with some settings changed."""
    return [f"{name}={value!r}" for name, value in (SMALL | _folders(sources) | more).items()]


def finetuning_overrides(sources: pathlib.Path, model: pathlib.Path, **more) -> list[str]:
    """Overrides for a short fine-tuning of a model, such as `tiny_model.write_model` makes."""
    settings = FINETUNING | _folders(sources) | {"model.path": str(model)} | more
    return [f"{name}={value!r}" for name, value in settings.items()]


def _folders(sources: pathlib.Path) -> dict:
    return {"text.sources": (str(sources / "train"),), "text.held_out": str(sources / "held_out")}
