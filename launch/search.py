"""Finds how many experts each layer should have, for the mean numbers of `search.budgets`.

    python launch/search.py --config configs/search_demo.gin --out out/search

Schedules are found by measured divergence from the full model on text.sources, then compared on text.held_out with the
schedules (b,h,e,p) of the same mean, with LExI's data-free ones and with the same k in every layer. A killed run
resumes when it is started again with the same --out. OUT/searched.md has the table; OUT/costs.csv what fewer experts
cost in each layer; OUT/config.gin what was found, as sweep.policies.
"""

import dataclasses
import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Checks the configuration, searches, and judges what was found."""
    config, search = run.config, run.config.search
    path = command.in_repository(config.text.held_out, "text.held_out")

    import tqdm

    from moe_jax import files
    from moe_jax.evaluation import concurrent
    from moe_jax.evaluation.journal import Journal, identity
    from moe_jax.report import searched
    from moe_jax.study import schedule_study, schedules
    from moe_jax.text import corpus
    from moe_jax.text.held_out import load_held_out
    from moe_jax.text.tokenizer import encode_documents

    if config.policy.k_max:
        raise ValueError(f"policy.k_max = {config.policy.k_max}: expected 0, schedules keep at most the model's own k")
    opened, execution = run.open_model(calibrated=False)
    architecture, tokenizer = opened.architecture, opened.require_tokenizer()
    execution = dataclasses.replace(execution, k_max=architecture.moe.k)
    schedules.totals(search.budgets, architecture)  # checks them
    if search.context > architecture.decoder.max_context:
        raise ValueError(f"search.context = {search.context}: expected at most {architecture.decoder.max_context}")
    with run.timed("text"):
        held_out = load_held_out(path)
        settings = ("text.held_out", "search.held_out_windows", "search.context")
        tokens = encode_documents(tokenizer, held_out)
        windows = concurrent.cut_windows(
            tokens, tokenizer, search.context, search.held_out_windows, config.run.seed, settings
        )
        collected = corpus.collect(config.text.sources, held_out)
        calibration_JT = schedule_study.calibration_windows(collected.documents, tokenizer, search, config.run.seed)
    params = run.load(opened).params
    depends_on = identity(config, [opened.folder, path], run.implementations) | {"text": collected.sha256}
    journal = Journal(run.out / "parts", depends_on)
    with run.timed("run"), tqdm.tqdm(unit="schedule", disable=None) as progress:
        shared = execution, journal, progress.update
        found = schedule_study.run(params, calibration_JT, windows, search, config.run.seed, *shared)
    subject = (
        f"{config.model.path}, {config.model.dtype}; found on {search.windows} windows of {search.context} tokens of "
        f"text.sources, judged on {search.held_out_windows} ({windows.bytes_J.sum() / 1e3:.0f} kB) of "
        f"{config.text.held_out}."
    )
    table = searched.table(found, subject)
    files.write_atomically(run.out / "searched.md", table + "\n")
    files.write_atomically(run.out / "costs.csv", searched.costs_csv(found))
    run.config = dataclasses.replace(
        config, sweep=dataclasses.replace(config.sweep, policies=("model", *found.policies))
    )
    run.finish(searched.figures(found), rows=searched.rows(found), text=table)
    journal.forget()


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "search_demo.gin"),
        default_out="out/search",
        huge_pages=True,
    )
