"""A fine-tuned model before and after: figures, tables, and its model card."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.config.schema import Config
from moe_jax.evaluation.intervals import paired_ratio, ratio, recovered
from moe_jax.report.figures import Row, documents_csv, figure, overflow_figure, policy_table
from moe_jax.report.plots import draw_training_curve
from moe_jax.study.recover import Recovered


def rows(finished: Recovered) -> list[Row]:
    """The rows of result.json, one for each policy.

    `bits_per_byte_increase` is relative to the full model before, `change` to the same policy before, both paired by
    document. `recovered` is the share of the policy's cost that was won back, the cost being relative to the better of
    the full models before and after; only policies whose cost has an interval above zero have it. With another teacher,
    that one is the full model.
    """
    bytes_J, teacher = finished.text.reported.bytes_J, finished.taught_by
    full = min(finished.before[0].bits_J, finished.after[0].bits_J, key=np.sum) if teacher is None else teacher.bits_J
    start = finished.before[0].bits_J if teacher is None else full
    rows = []
    for number, (policy, before, after) in enumerate(zip(finished.compared, finished.before, finished.after)):
        figures = {
            "bits_per_byte_before": figure(ratio(before.bits_J, bytes_J), "bit/byte"),
            "bits_per_byte": figure(ratio(after.bits_J, bytes_J), "bit/byte"),
            "change": figure(paired_ratio(after.bits_J, before.bits_J), "1"),
            "bits_per_byte_increase": figure(paired_ratio(after.bits_J, start), "1"),
        }
        if (number or teacher) and paired_ratio(before.bits_J, full).ci95[0] > 0:
            figures["recovered"] = figure(recovered(before.bits_J, after.bits_J, full), "1")
        rows.append({"policy": policy.spec, "figures": figures})
    return rows


def figures(finished: Recovered, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of result.json: of the trained policy and of the run."""
    [trained] = [row["figures"] for row in rows if row["policy"] == finished.trained.spec]
    return trained | {
        "training_tokens_per_s": {"value": finished.tokens_per_s, "unit": "token/s"},
        **overflow_figure(finished.overflow),
        **_teacher_figure(finished),
        "steps": {"value": finished.steps, "unit": "1"},
        "best_step": {"value": finished.step, "unit": "1"},
        "masked_experts": {"value": finished.masked_experts, "unit": "experts"},
    }


def _teacher_figure(finished: Recovered) -> dict[str, Any]:
    if finished.taught_by is None:
        return {}
    return {
        "bits_per_byte_teacher": figure(ratio(finished.taught_by.bits_J, finished.text.reported.bytes_J), "bit/byte")
    }


def table(rows: Sequence[Row]) -> str:
    """One line per policy, in Markdown; intervals are 95%."""
    columns = {
        "bits per byte before": ("bits_per_byte_before", "{:.4f}"),
        "after": ("bits_per_byte", "{:.4f}"),
        "change, paired": ("change", "{:+.2%}"),
        "over the full model, paired": ("bits_per_byte_increase", "{:+.2%}"),
        "recovered": ("recovered", "{:.0%}"),
    }
    return policy_table(rows, columns)


def note(config: Config) -> str:
    """A caveat for the table: part of the gain may come from training longer, not from recovery; "" if none is due."""
    weight = config.objective.language_model
    if not weight:
        return ""
    return (
        f"The next token has a weight of {weight:g} in the objective, so the gain includes what longer training gives "
        "any model; a control run with --set policy.spec=model --set objective.distillation=0 measures that part."
    )


def model_card(config: Config, finished: Recovered, table: str) -> str:
    """MODEL_CARD.md: which model was tuned, how, and with what result."""
    training, objective, tuning = config.training, config.objective, config.finetune
    text, trained = finished.text, finished.trained
    terms = {name: getattr(objective, name) for name in ("language_model", "distillation", "hidden", "sparsity")}
    weighted = ", ".join(f"{name} {weight:g}" for name, weight in terms.items() if weight)
    teacher = f"teacher `{tuning.teacher}`, " if tuning.teacher else ""
    compared = (
        f" ({teacher}{objective.direction}, temperature {objective.temperature:g})" if objective.has_teacher else ""
    )
    under = f"k drawn per {tuning.k_drawn_per} from {tuning.k_min} on" if tuning.elastic else f"policy `{trained.spec}`"
    tokens = training.batch_size * training.accumulation * training.sequence_length
    written = f"{tuning.rollouts:,} rollouts of the full model, which continue " if tuning.rollouts else ""
    return f"""# Model card

Fine-tuned by `launch/finetune.py` from `{config.model.path}`, so that it does with fewer experts what it did with all.

- trained under: {under}; trained parameters: {tuning.train}
- {finished.steps:,} steps of {tokens:,} tokens; the weights are those after step {finished.step:,}, the best
- AdamW, peak learning rate {training.learning_rate:g}, {training.warmup_steps} steps of warm-up, then a cosine; seed
  {config.run.seed}
- objective: {weighted}{compared}
- training text: {written}{text.num_documents:,} documents, {text.packed.num_tokens / 1e6:.1f} M tokens
- best step chosen on {len(text.watched.documents)} held-out documents; results measured on
  {len(text.reported.documents)} others
- {finished.tokens_per_s:,.0f} tokens/s (median)

![Training curve](training_curve.png)

{table}

{note(config)}
"""


def write(config: Config, folder: pathlib.Path, finished: Recovered, rows: Sequence[Row]) -> None:
    """Writes `documents.csv`, the bits of each document before and after, and the exported model's card and curve."""
    bits = [
        (f"{when} {policy.spec}", scored.bits_J)
        for when, likelihoods in (("before", finished.before), ("after", finished.after))
        for policy, scored in zip(finished.compared, likelihoods)
    ]
    files.write_atomically(folder / "documents.csv", documents_csv(finished.text.reported.documents, bits))
    files.write_atomically(folder / "model" / "training_curve.png", draw_training_curve(folder / "metrics.jsonl"))
    files.write_atomically(folder / "model" / "MODEL_CARD.md", model_card(config, finished, table(rows)))
