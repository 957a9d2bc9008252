"""Measures the frontier of quality against speed, for every policy of `sweep.policies` at every concurrency.

    python launch/sweep.py --config configs/sweep_demo.gin --out out/sweep

Quality is measured with the model of model.path on held-out text. Speed is measured with the same model or, if
sweep.timed_config is set, with that model, which replays the routing of the first. For a fine-tuned model,
sweep.original names the model that it was made from: that one with all its experts is then the reference. Models in
sweep.pruned, with fewer experts, are on the same frontier. A killed run resumes when it is started again with the same
--out, also after --quality_only. OUT/frontier.html needs no network; OUT/frontier.png has its charts, OUT/frontier.csv
every point.
"""

import dataclasses
import os
import pathlib

from absl import flags

from moe_jax import command
from moe_jax.config import gin
from moe_jax.config.schema import folder_name

ROOT = pathlib.Path(__file__).parents[1]
QUALITY_ONLY = flags.DEFINE_bool("quality_only", False, "Stop before the timing; the same command without it goes on.")


def main(run: command.Command) -> None:
    """Checks the configuration, then measures quality, then speed."""
    config, sweep = run.config, run.config.sweep
    held_out = command.in_repository(config.text.held_out, "text.held_out")

    import tqdm

    from moe_jax import checkpoint, files
    from moe_jax.cost import hardware
    from moe_jax.evaluation import concurrent
    from moe_jax.evaluation.journal import Journal, identity
    from moe_jax.report import frontier_result
    from moe_jax.report.frontier_chart import png
    from moe_jax.report.frontier_page import page
    from moe_jax.report.frontier_table import table, to_csv
    from moe_jax.study import sweep as study
    from moe_jax.study.frontier import Frontier
    from moe_jax.text.held_out import load_held_out
    from moe_jax.text.tokenizer import encode_documents

    opened, execution = run.open_model()
    architecture, original = opened.architecture, opened
    if sweep.original:
        original = checkpoint.open(
            command.in_repository(sweep.original, "sweep.original"), calibration=None, setting="sweep.original"
        )
        study.require_alike(original.architecture, architecture, "sweep.original")
    execution = dataclasses.replace(execution, k_max=max(execution.k_max, original.architecture.moe.k))
    compared = study.parsed(sweep, opened.calibration, execution)
    smaller = open_pruned(run, opened)
    if sweep.context > architecture.decoder.max_context:
        raise ValueError(f"sweep.context = {sweep.context}: expected at most {architecture.decoder.max_context}")
    timed, timed_opened = timed_model(config, opened)
    with run.timed("text"):
        documents = load_held_out(held_out)[: config.evaluation.documents or None]
        tokenizer = opened.require_tokenizer()
        if original.require_tokenizer().to_str() != tokenizer.to_str():
            raise ValueError(f"sweep.original = {sweep.original!r}: expected a model with the tokenizer of model.path")
        tokens = encode_documents(tokenizer, documents)
        windows = concurrent.cut_windows(tokens, tokenizer, sweep.context, sweep.windows, config.run.seed)
    model = run.load(opened)
    candidates = [study.Candidate(policy, lambda: model.params, execution) for policy in compared]
    if sweep.original:
        original_execution = dataclasses.replace(execution, architecture=original.architecture)
        candidates[0] = study.Candidate(compared[0], lambda: run.load(original).params, original_execution)
    for path, one in zip(sweep.pruned, smaller, strict=True):
        own = dataclasses.replace(execution, architecture=one.architecture, k_max=one.architecture.moe.k)
        candidates.append(study.Candidate(compared[0], lambda one=one: run.load(one).params, own, folder_name(path)))

    shape = timed.architecture if timed_opened is None else timed_opened.architecture
    for candidate in candidates:
        study.timed_as(candidate, shape)  # refuses what cannot be timed before anything is measured

    timed_folder = timed.model.path and command.in_repository(timed.model.path)
    paths = [opened.folder, original.folder, *(one.folder for one in smaller), held_out, config.policy.calibration]
    paths.append(timed_folder)
    depends_on = identity(config, paths, run.implementations) | {"timed": dataclasses.asdict(timed)}
    journal = Journal(run.out / "parts", depends_on)
    total = study.num_qualities(candidates, sweep) + sweep.rounds * len(sweep.concurrencies)
    with tqdm.tqdm(total=total, unit="part", disable=None) as progress:
        with run.timed("quality"):
            progress.set_description("quality")
            shared = {"config": sweep, "journal": journal, "advance": progress.update}
            qualities = study.measure_quality(candidates, windows, **shared)
        if QUALITY_ONLY.value:
            print("quality is measured: the same command without --quality_only goes on with the timing")
            return
        with run.timed("speed"):
            progress.set_description("speed")
            timed_engine, in_words = make_timed_engine(config, timed, timed_opened, model, execution)
            speeds = study.measure_speed(timed_engine, candidates, qualities, **shared)
    frontier = Frontier(
        study.points(windows, candidates, qualities, speeds, timed_engine),
        f"{config.model.path}{f' (`model` is {sweep.original})' if sweep.original else ''}, {config.model.dtype}, "
        f"{len(windows.bytes_J)} windows of {sweep.context} tokens "
        f"({windows.bytes_J.sum() / 1e3:.0f} kB) of {config.text.held_out}",
        in_words,
        hardware.in_words(),
    )
    files.write_atomically(run.out / "frontier.csv", to_csv(frontier))
    files.write_atomically(run.out / "frontier.html", page(frontier))
    files.write_atomically(run.out / "frontier.png", png(frontier))
    run.finish(frontier_result.figures(frontier), rows=frontier_result.rows(frontier), text=table(frontier))
    journal.forget()


def open_pruned(run, opened):
    """The checkpoints of sweep.pruned, checked against the swept model."""
    from moe_jax import checkpoint
    from moe_jax.study.sweep import require_pruned

    found = []
    for path in run.config.sweep.pruned:
        setting = f"sweep.pruned: {path}"
        one = checkpoint.open(command.in_repository(path, "sweep.pruned"), calibration=None, setting="sweep.pruned")
        require_pruned(one.architecture, opened.architecture, setting)
        if one.require_tokenizer().to_str() != opened.require_tokenizer().to_str():
            raise ValueError(f"{setting}: expected a model with the tokenizer of model.path")
        found.append(one)
    return found


def timed_model(config, opened):
    """The configuration of the timed model, and its checkpoint, opened; None if its weights are random."""
    from moe_jax import checkpoint
    from moe_jax.study.sweep import require_alike

    timed, other = config, opened
    if config.sweep.timed_config:
        timed = gin.read_config(command.in_repository(config.sweep.timed_config, "sweep.timed_config"))
        path = timed.model.path
        other = checkpoint.open(command.in_repository(path)) if path else None
    architecture = timed.architecture if other is None else other.architecture
    require_alike(architecture, opened.architecture, "sweep.timed_config")
    expected = opened.eight_bits(config.model.expert_dtype)
    if expected != (timed.model.eight_bits if other is None else other.eight_bits(timed.model.expert_dtype)):
        raise ValueError(
            f"sweep.timed_config has model.expert_dtype = {timed.model.expert_dtype!r}: expected experts in "
            f"{expected or 'model.dtype'}, as those of model.path are"
        )
    most = architecture.decoder.max_context - 2
    if config.sweep.cached_tokens > most:
        raise ValueError(
            f"sweep.cached_tokens = {config.sweep.cached_tokens}: expected at most {most}, two less than the timed "
            "model's context"
        )
    return timed, other


def make_timed_engine(config, timed, other, model, execution):
    """The timed model (the measured one, another, or one with random weights), and what it is, in words."""
    from moe_jax.api import Model
    from moe_jax.engine.generate import Engine
    from moe_jax.study.random_model import random_params
    from moe_jax.study.sweep import TimedEngine

    if timed is config:
        return TimedEngine(model.engine, execution), "the same model, with the same routing"
    routed = f"{config.sweep.timed_config}, {timed.model.dtype}, with the other model's routing"
    if other is not None:
        engine = Model(other, other.load(timed.model.dtype, expert_dtype=timed.model.expert_dtype)).engine
        return TimedEngine(engine, dataclasses.replace(execution, architecture=other.architecture)), routed
    dtype = "float32" if timed.model.dtype == "auto" else timed.model.dtype
    params = random_params(timed.architecture, dtype, config.run.seed, timed.model.eight_bits)
    engine = Engine(params, None, ())
    timed_execution = dataclasses.replace(execution, architecture=timed.architecture)
    return TimedEngine(engine, timed_execution), f"random weights in the shape of {routed}"


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "sweep_demo.gin"),
        default_out="out/sweep",
        huge_pages=True,
    )
