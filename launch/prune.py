"""Removes experts: ranks them by several methods, measures each smaller model, and writes those that are asked for.

    python launch/prune.py --config configs/prune_demo.gin --out out/prune

Experts are ranked on the text of text.sources, and models are measured on the held-out text: bits per byte with 95%
intervals, paired by document. OUT/NAME/ has each model NAME of prune.export, such as OUT/reap_32/, which this project,
transformers and vLLM load; docs/pruning.md says how to win back what it lost. A killed run continues when it is started
again with the same --out.
"""

import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Checks the configuration, ranks the experts, then makes, measures and writes models."""
    config = run.config
    held_out = command.in_repository(config.text.held_out, "text.held_out")

    import tqdm

    from moe_jax.evaluation.journal import Journal, identity
    from moe_jax.report import pruned as report
    from moe_jax.study import prune, pruning
    from moe_jax.text import corpus
    from moe_jax.text.held_out import load_held_out

    require_own(config)
    opened, execution = run.open_model(calibrated=False, expert_dtype="model")
    architecture = opened.architecture
    choices = pruning.choices(config.prune, architecture)
    with run.timed("text"):
        documents = load_held_out(held_out)
        collected = corpus.collect(config.text.sources, documents)
        text = prune.prepare_text(config, opened, collected.documents, documents)
    params = run.load(opened, "model").params
    prune.require_memory(params, architecture, choices)
    depends_on = identity(config, [opened.folder, held_out], run.implementations) | {"text": collected.sha256}
    journal = Journal(run.out / "parts", depends_on)
    dtype = opened.expected_dtype if config.model.dtype == "auto" else config.model.dtype
    with tqdm.tqdm(total=prune.num_parts(text, choices), unit="part", disable=None) as progress:
        with run.timed("rank"):
            statistics = prune.rank(params, text, execution, journal, progress.update)
        with run.timed("measure"):
            executions = execution, lambda smaller: run.execution_of(smaller, dtype)
            measured = prune.measure(config, params, text, choices, statistics, *executions, journal, progress.update)
    with run.timed("export"):
        prune.export(config, run.out, opened, measured[1])
    rows = report.rows(text, architecture, *measured)
    run.finish(rows[0]["figures"], rows=rows, text=report.table(rows))
    journal.forget()


def require_own(config) -> None:
    """Refuses settings of how experts run that pruning does not follow."""
    if config.model.eight_bits:
        raise ValueError(
            f"model.expert_dtype = {config.model.expert_dtype!r}: expected auto or model, with which experts are "
            "ranked and measured in model.dtype"
        )
    if config.policy.k_max:
        raise ValueError(
            f"policy.k_max = {config.policy.k_max}: expected 0, a pruned model runs with the model's own k"
        )


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "prune_demo.gin"),
        default_out="out/prune",
        huge_pages=True,
    )
