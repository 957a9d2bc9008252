"""Compares a model with transformers on a short text, runs a short sweep, and writes the results to one page.

    python benchmarks/real_weights.py allenai/OLMoE-1B-7B-0924 --out out/real_weights

NAME is what `model.path` takes: `organisation/name`, `organisation/name@revision`, or a folder. Weights are downloaded
unless they are in the cache. moe_jax, transformers and launch/sweep.py run in separate processes, one after the other,
so that only one copy of the model is in memory. transformers computes in model.dtype, or in the dtype of most weights
if that is "auto"; install it from requirements-peers.txt. OUT/page.md has the result, OUT/sweep the whole frontier.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

from moe_jax import command, files

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = 128
OURS = """
import sys
import numpy as np
from moe_jax import api
model = api.load(sys.argv[1], dtype=sys.argv[2], calibration=None)
np.save(sys.argv[4], model.logits(np.load(sys.argv[3])[None])[0])
"""
THEIRS = """
import sys
import numpy as np, torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(np.load(sys.argv[3])[None].astype(np.int64))).logits[0]
np.save(sys.argv[4], logits.float().numpy())
"""


def main(run: command.Command) -> None:
    """Opens the model, compares, sweeps, and writes the page."""
    from moe_jax.text.held_out import load_held_out

    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        raise ValueError("transformers or torch is not installed: pip install -r requirements-peers.txt")
    opened, _ = run.open_model(calibrated=False)
    held_out = command.in_repository(run.config.text.held_out, "text.held_out")
    length = min(TOKENS, opened.architecture.decoder.max_context)
    encoded = (opened.require_tokenizer().encode(one.text).ids for one in load_held_out(held_out))
    ids = next(ids for ids in encoded if len(ids) >= length)[:length]
    with run.timed("fetch"):
        stored = opened.stored_dtype  # downloads the weights if they are not there yet
    dtypes = [stored if run.config.model.dtype == "auto" else run.config.model.dtype, run.config.model.dtype]
    with run.timed("transformers"):
        theirs_TV = logits_of(THEIRS, opened.folder, dtypes[0], ids, run.out / "transformers")
    with run.timed("moe_jax"):
        ours_TV = logits_of(OURS, opened.folder, dtypes[1], ids, run.out / "moe_jax")
    figures = compare(ours_TV, theirs_TV, ids)
    with run.timed("sweep"):
        frontier = sweep(run, opened.folder)
    page = page_of(run, opened, dtypes[0], figures, frontier)
    files.write_atomically(run.out / "page.md", page)
    run.finish(figures, text=f"{page}\n{run.out / 'page.md'}")


def logits_of(program: str, folder: pathlib.Path, dtype: str, ids: list[int], place: pathlib.Path):
    """Computes logits_TV, float32, in a process that frees its memory when it ends."""
    import numpy as np

    tokens, logits = (place.with_name(f"{place.name}_{what}.npy") for what in ("tokens", "logits"))
    np.save(tokens, np.array(ids, np.int32))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command_line = [sys.executable, "-c", program, str(folder), dtype, str(tokens), str(logits)]
    try:
        if subprocess.run(command_line, env=environment, stdout=sys.stderr).returncode:
            raise ValueError(f"{place.name} gave no logits: see its own message above")
        return np.load(logits)
    finally:
        tokens.unlink(missing_ok=True)
        logits.unlink(missing_ok=True)


def compare(ours_TV, theirs_TV, ids: list[int]) -> dict:
    """Compares two arrays of logits of the same tokens."""
    import numpy as np

    ours_TV, theirs_TV = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in np.float64((ours_TV, theirs_TV)))
    kl_T = (np.exp(theirs_TV) * (theirs_TV - ours_TV)).sum(axis=1)
    labels, rows = ids[1:], np.arange(len(ids) - 1)
    figures = {
        "kl_mean": (kl_T.mean(), "nat"),
        "kl_max": (kl_T.max(), "nat"),
        "log_probability_max_difference": (np.abs(ours_TV - theirs_TV)[rows, labels].max(), "nat"),
        "same_first_choice": (100 * (ours_TV.argmax(axis=1) == theirs_TV.argmax(axis=1)).mean(), "%"),
        "bits_per_token": (-ours_TV[rows, labels].mean() / np.log(2), "bit"),
        "bits_per_token_of_transformers": (-theirs_TV[rows, labels].mean() / np.log(2), "bit"),
    }
    return {name: {"value": float(value), "unit": unit} for name, (value, unit) in figures.items()}


def sweep(run: command.Command, folder: pathlib.Path) -> str:
    """Runs a short sweep; returns its table."""
    from moe_jax.config import gin

    files.write_atomically(run.out / "sweep.gin", gin.to_gin(run.config))
    flags = [f"--config={run.out / 'sweep.gin'}", f"--set=model.path={folder}", f"--out={run.out / 'sweep'}"]
    command_line = [sys.executable, str(ROOT / "launch" / "sweep.py"), *flags]
    done = subprocess.run(command_line, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"launch/sweep.py ended with status {done.returncode}: see its own message above")
    return done.stdout


def page_of(run: command.Command, opened, dtype: str, figures: dict, frontier: str) -> str:
    """The results in Markdown."""
    import datetime

    from moe_jax.model import parameters

    architecture, about = opened.architecture, command.provenance()
    versions = {name: about["versions"][name] for name in ("moe_jax", "jax", "python")}
    versions["transformers"] = importlib.metadata.version("transformers")
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {one['value']:.3g} {one['unit']} |" for name, one in figures.items()
    )
    return f"""# {run.config.model.path}

{parameters.count(architecture) / 1e6:,.1f} M parameters of the family {opened.family.model_type}, stored in
{opened.stored_dtype}, run in {dtype}; {architecture.moe.k} of {architecture.moe.num_experts} experts in
{architecture.decoder.num_moe_layers} layers. Weights from {opened.folder}. {about["device"]["kind"]},
{datetime.date.today()}; {", ".join(f"{name} {version}" for name, version in versions.items())}.

## Beside transformers

The logits of {TOKENS} tokens at most of {run.config.text.held_out}, each program in {dtype}. Where two experts score
nearly alike, rounding decides which runs: in half precision a few tokens differ for that reason alone.

| | |
|---|---|
{rows}

## Fewer experts

{frontier.strip()}
"""


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--set=model.path={sys.argv[1]}"
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "real_weights.gin"),
        default_out="out/real_weights",
    )
