"""Measures what fewer experts cost in quality: every policy of `evaluation.policies` on held-out text, side by side.

    python launch/evaluate.py --config configs/evaluate_demo.gin --out out/evaluate

It measures bits per byte, divergence from the full model, the choice of the next line among four, how often a completed
function parses, and expert load, with 95% intervals over documents and differences from the first policy, paired by
document. A killed run resumes when it is started again with the same --out. OUT/documents.csv and OUT/expert_load.csv
have the details.
"""

import os
import pathlib

from moe_jax import command, files

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Checks the configuration, then loads the model and measures."""
    config = run.config
    config.mesh.require_batch("evaluation.batch_size", config.evaluation.batch_size)
    held_out = command.in_repository(config.text.held_out, "text.held_out")

    from moe_jax.evaluation.journal import Journal, identity
    from moe_jax.evaluation.likelihood import xz_bits_per_byte
    from moe_jax.report import evaluated
    from moe_jax.study import compare
    from moe_jax.text.held_out import load_held_out

    opened, execution = run.open_model()
    executions = {config.model.expert_dtype: execution}
    for expert_dtype in config.evaluation.expert_dtypes:
        _, executions[expert_dtype] = run.open_model(expert_dtype=expert_dtype)
    if len(executions) > 1:
        run.implementations["expert_dtype"] = ", ".join(executions)
    tokenizer, seed = opened.require_tokenizer(), config.run.seed
    with run.timed("text"):
        documents, calibration = load_held_out(held_out), opened.calibration
        task = compare.prepare(config.evaluation, seed, documents, tokenizer, execution, calibration)
        xz = xz_bits_per_byte([document.text.encode() for document in task.held_out.documents])

    paths = [opened.folder, held_out, config.policy.calibration]
    depends_on = identity(config, paths, run.implementations)
    journals, parts = [], []
    for expert_dtype, execution in executions.items():
        model = run.load(opened, expert_dtype)
        journals.append(Journal(run.out / "parts", depends_on | {"expert_dtype": expert_dtype}))
        shared = tokenizer, execution, journals[-1]
        weights = f"experts in {expert_dtype}" if parts else ""
        with run.timed("run"):
            parts.append(compare.measure(config.evaluation, seed, task, model.engine, *shared, weights))
        del model  # before the next is loaded
    measured = compare.joined(parts)

    rows = evaluated.rows(task, measured)
    figures = rows[0]["figures"] | {"xz_bits_per_byte": {"value": xz, "unit": "bit/byte"}}
    for name, text in evaluated.details(task, measured).items():
        files.write_atomically(run.out / name, text)
    run.finish(figures, rows=rows, text=f"{evaluated.table(rows)}\n`xz -9e` of the same text: {xz:.3f} bits per byte")
    for journal in journals:
        journal.forget()


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "evaluate_demo.gin"),
        default_out="out/evaluate",
        huge_pages=True,
        on_mesh=True,
    )
