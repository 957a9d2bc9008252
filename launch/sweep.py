"""Draws the frontier of quality against speed: every policy of `sweep.policies` at every load, as a page and a table.

    python launch/sweep.py --config configs/sweep_demo.gin --out out/sweep

Quality is measured on the model of model.path, on held-out text; speed on the model of sweep.timed_config, which takes
the routing that the policies made, or on the same one. A model that was fine-tuned for fewer experts is compared with
all experts of the one it was made from, sweep.original. Started again with the same --out, it goes on where it was
killed. OUT/frontier.html needs no network; OUT/frontier.csv has every point.
"""

import dataclasses
import os
import pathlib

from moe_jax import command
from moe_jax.config import gin

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Checks all that was asked for, then measures quality, then speed."""
    config, sweep = run.config, run.config.sweep
    path = command.in_repository(config.model.path)
    held_out = command.in_repository(config.text.held_out, "text.held_out")

    import tqdm

    import moe_jax
    from moe_jax import files
    from moe_jax.checkpoint.huggingface import read_architecture
    from moe_jax.cost import hardware
    from moe_jax.engine.request import execution_of
    from moe_jax.evaluation import concurrent
    from moe_jax.evaluation.journal import Journal, identity
    from moe_jax.report import frontier_result
    from moe_jax.report.frontier_page import page
    from moe_jax.report.frontier_table import table, to_csv
    from moe_jax.routing import calibration as calibrations
    from moe_jax.study import sweep as study
    from moe_jax.study.frontier import Frontier
    from moe_jax.text.corpus import load_held_out
    from moe_jax.text.tokenizer import encode_documents, load_tokenizer

    architecture = read_architecture(path)
    command.refuse_other_shape(config, architecture)
    original_path = command.in_repository(sweep.original, "sweep.original") if sweep.original else path
    original_architecture = read_architecture(original_path)
    study.require_alike(original_architecture, architecture, "sweep.original")
    k_max = max(config.policy.k_max or architecture.moe.k, original_architecture.moe.k)
    execution = execution_of(architecture, k_max, config.kernels)
    run.implementations |= execution.implementations
    compared = study.parsed(sweep, calibrations.find(config.policy.calibration, path), execution)
    if sweep.context > architecture.decoder.max_context:
        raise ValueError(f"sweep.context = {sweep.context}: wanted at most {architecture.decoder.max_context}")
    timed = timed_config(config, architecture)
    with run.timed("text"):
        documents = load_held_out(held_out)[: config.evaluation.documents or None]
        tokenizer = load_tokenizer(path)
        if load_tokenizer(original_path).to_str() != tokenizer.to_str():
            raise ValueError(f"sweep.original = {sweep.original!r}: wanted a model with the tokenizer of model.path")
        tokens = encode_documents(tokenizer, documents)
        windows = concurrent.cut(tokens, tokenizer, sweep.context, sweep.windows, config.run.seed)
    with run.timed("load"):
        model = moe_jax.load(path, dtype=config.model.dtype, calibration=config.policy.calibration)
        candidates = [study.Candidate(policy, model.params, execution) for policy in compared]
        if sweep.original:
            original = moe_jax.load(original_path, dtype=config.model.dtype, calibration=None)
            original_execution = dataclasses.replace(execution, architecture=original_architecture)
            candidates[0] = study.Candidate(compared[0], original.params, original_execution)

    given = (config.policy.calibration, timed.model.path and command.in_repository(timed.model.path))
    places = [path, original_path, held_out, *(pathlib.Path(place) for place in given if place)]
    depends_on = identity(config, places, run.implementations) | {"timed": dataclasses.asdict(timed)}
    journal = Journal(run.out / "parts", depends_on)
    total = study.num_qualities(compared, sweep) + sweep.rounds * len(sweep.concurrencies)
    with tqdm.tqdm(total=total, unit="part", disable=None) as progress:
        with run.timed("quality"):
            progress.set_description("quality")
            shared = {"config": sweep, "journal": journal, "advance": progress.update}
            qualities = study.measure_quality(candidates, windows, **shared)
        with run.timed("speed"):
            progress.set_description("speed")
            subject, in_words = subject_of(config, timed, model, execution)
            speeds = study.measure_speed(subject, compared, qualities, **shared)
    found = Frontier(
        study.points(windows, compared, qualities, speeds, architecture),
        f"{config.model.path}{f' (`model` is {sweep.original})' if sweep.original else ''}, {config.model.dtype}, "
        f"{len(windows.bytes_J)} windows of {sweep.context} tokens "
        f"({windows.bytes_J.sum() / 1e3:.0f} kB) of {config.text.held_out}",
        in_words,
        hardware.in_words(),
    )
    files.write_atomically(run.out / "frontier.csv", to_csv(found))
    files.write_atomically(run.out / "frontier.html", page(found))
    run.finish(frontier_result.figures(found), rows=frontier_result.rows(found), text=table(found))
    journal.forget()


def timed_config(config, architecture):
    """The configuration of the model that is timed."""
    from moe_jax.checkpoint.huggingface import read_architecture
    from moe_jax.study.sweep import require_alike

    timed, own = config, architecture
    if config.sweep.timed_config:
        timed = gin.read_config(command.in_repository(config.sweep.timed_config, "sweep.timed_config"))
        own = timed.architecture
    if timed is not config and timed.model.path:
        own = read_architecture(command.in_repository(timed.model.path))
    require_alike(own, architecture, "sweep.timed_config")
    if own.decoder.max_context < config.sweep.cached_tokens + 2:
        raise ValueError(
            f"sweep.cached_tokens = {config.sweep.cached_tokens}: wanted at most {own.decoder.max_context - 2}, two "
            "less than the context of the model that is timed"
        )
    return timed


def subject_of(config, timed, model, execution):
    """The model that is timed: the one at hand, another, or one of random weights; and what it is, in words."""
    import moe_jax
    from moe_jax.engine.generate import Engine
    from moe_jax.study.random_model import random_params
    from moe_jax.study.sweep import Subject

    if timed is config:
        return Subject(model.engine, execution), "the same model, routed as it was there"
    routed = f"{config.sweep.timed_config}, {timed.model.dtype}, routed as the other model was"
    if timed.model.path:
        other = moe_jax.load(command.in_repository(timed.model.path), dtype=timed.model.dtype)
        return Subject(other.engine, dataclasses.replace(execution, architecture=other.architecture)), routed
    dtype = "float32" if timed.model.dtype == "auto" else timed.model.dtype
    engine = Engine(random_params(timed.architecture, dtype, config.run.seed), None, ())
    timed_execution = dataclasses.replace(execution, architecture=timed.architecture)
    return Subject(engine, timed_execution), f"random weights of the shape of {routed}"


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "sweep_demo.gin"),
        default_out="out/sweep",
        huge_pages=True,
    )
