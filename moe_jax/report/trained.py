"""Exports a trained model, measures the export, and writes its model card."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moe_jax import checkpoint, files
from moe_jax.checkpoint import families
from moe_jax.config.schema import Config
from moe_jax.cost import roofline
from moe_jax.evaluation.intervals import Estimate, paired_ratio, ratio
from moe_jax.evaluation.likelihood import num_windows, score_documents, xz_bits_per_byte
from moe_jax.model.decoder import Execution, Params
from moe_jax.report.evaluated import load_max_over_mean
from moe_jax.report.plots import draw_training_curve
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from moe_jax.training.pretraining import PretrainingText


class PolicyQuality(NamedTuple):
    """The results of one policy on the held-out text."""

    policy: str
    bits_per_byte: Estimate
    worse: Estimate | None  # increase of bits per byte over the first policy, a fraction, paired by document
    load_max_over_mean: float  # of the most uneven MoE layer
    unused_experts: int  # in all MoE layers


class TrainedModel(NamedTuple):
    """The figures of a trained model, as exported."""

    rows: Sequence[PolicyQuality]
    xz: float  # bits per byte of the same text by `xz -9e`
    xz_primed: float  # the same, after the compressor has read the training text
    tokens_per_s: float  # median over the run
    parameters: int
    active_parameters: int  # read for one token, with the model's own k


def require_policies(config: Config, execution: Execution) -> None:
    """Raises ValueError if a policy of `evaluation.policies` does not fit the model, before hours of training."""
    policies.settings([parse(spec) for spec in config.evaluation.policies], execution.architecture, execution.k_max)


def finish(
    config: Config, folder: pathlib.Path, text: PretrainingText, execution: Execution, params: Params
) -> TrainedModel:
    """Exports the trained model to `folder/model` with tokenizer, curve and card, and measures the export."""
    metrics = folder / "metrics.jsonl"
    begun = checkpoint.begun(config.architecture, text.tokenizer)
    files_beside = {**begun.files, "training_curve.png": draw_training_curve(metrics)}
    dataclasses.replace(begun, files=files_beside).save(folder / "model", params, dtype="bfloat16", replace=True)
    exported = checkpoint.open(folder / "model").load("float32")
    measured = _measure(config, text, execution, exported)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    held_out_text, training_text = (
        [document.text.encode() for document in documents] for documents in (text.held_out, text.corpus.documents)
    )
    finished = TrainedModel(
        measured,
        xz_bits_per_byte(held_out_text),
        xz_bits_per_byte(held_out_text, primer=training_text),
        statistics.median(line["tokens_per_s"] for line in lines if "tokens_per_s" in line),
        roofline.parameters(config.architecture),
        roofline.active_parameters(config.architecture),
    )
    files.write_atomically(folder / "model" / "MODEL_CARD.md", model_card(config, text, finished))
    return finished


def _measure(config: Config, text: PretrainingText, execution: Execution, params: Params) -> list[PolicyQuality]:
    sizes = np.array([len(document.text.encode()) for document in text.held_out])
    context = config.decoder.max_context
    with tqdm(total=num_windows(text.held_out_tokens, context), unit="window", disable=None) as bar:
        scored = score_documents(
            params,
            text.held_out_tokens,
            [parse(spec) for spec in config.evaluation.policies],
            execution,
            context=context,
            batch_size=config.evaluation.batch_size,
            advance=bar.update,
        )
    return [
        PolicyQuality(
            spec,
            ratio(one.bits_J, sizes),
            paired_ratio(one.bits_J, scored[0].bits_J) if number else None,
            load_max_over_mean(one.load_LE),
            int((one.load_LE == 0).sum()),
        )
        for number, (spec, one) in enumerate(zip(config.evaluation.policies, scored))
    ]


def figures(finished: TrainedModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of result.json, of the first policy and of the run; and its rows, one per policy."""

    def row_figures(row: PolicyQuality) -> dict[str, Any]:
        found = {
            "bits_per_byte": _figure(row.bits_per_byte, "bit/byte"),
            "expert_load_max_over_mean": {"value": row.load_max_over_mean, "unit": "1"},
            "unused_experts": {"value": row.unused_experts, "unit": "experts"},
        }
        return found | ({"worse_than_first": _figure(row.worse, "1")} if row.worse else {})

    run_figures = {
        "xz_bits_per_byte": {"value": finished.xz, "unit": "bit/byte"},
        "xz_primed_bits_per_byte": {"value": finished.xz_primed, "unit": "bit/byte"},
        "training_tokens_per_s": {"value": finished.tokens_per_s, "unit": "token/s"},
        "parameters": {"value": finished.parameters, "unit": "1"},
        "active_parameters": {"value": finished.active_parameters, "unit": "1"},
    }
    rows = [{"policy": row.policy, "figures": row_figures(row)} for row in finished.rows]
    return rows[0]["figures"] | run_figures, rows


def _figure(estimate: Estimate, unit: str) -> dict[str, Any]:
    return {"value": estimate.value, "unit": unit, "ci95": estimate.ci95}


def table(finished: TrainedModel) -> str:
    """One line per policy, in Markdown."""
    head = "| policy | held-out bits per byte (95%) | worse, paired (95%) | max/mean load | experts unused |\n"
    lines = [head + "|---|---|---|---|---|"]
    for row in finished.rows:
        low, high = row.bits_per_byte.ci95
        worse = ""
        if row.worse:
            worse = f"{row.worse.value:.2%} ({row.worse.ci95[0]:.2%} to {row.worse.ci95[1]:.2%})"
        lines.append(
            f"| `{row.policy}` | {row.bits_per_byte.value:.4f} ({low:.4f} to {high:.4f}) | {worse} | "
            f"{row.load_max_over_mean:.2f} | {row.unused_experts} |"
        )
    return "\n".join(lines)


def model_card(config: Config, text: PretrainingText, finished: TrainedModel) -> str:
    """MODEL_CARD.md: what the model is, what it was trained on, and how good it is."""
    moe, decoder, attention, training = config.moe, config.decoder, config.attention, config.training
    seen_M = training.steps * training.batch_size * training.sequence_length / 1e6
    held_out_MB = sum(len(document.text.encode()) for document in text.held_out) / 1e6
    sources = "\n".join(
        f"| {name} | {source.files} | {source.bytes / 1e6:.2f} |" for name, source in text.corpus.statistics.items()
    )
    return f"""# Model card

A fine-grained Mixture-of-Experts decoder, trained from scratch by `launch/train.py` and exported in the
`{families.OWN.model_type}` layout: {finished.parameters:,} parameters, {finished.active_parameters:,} of them active
per token. It completes Python source text; it knows nothing else and follows no instructions.

## Shape

- {decoder.num_layers} layers, {decoder.num_dense_layers} of them dense; model width {decoder.d_model}
- {moe.num_experts} routed experts of width {moe.expert_hidden}, {moe.k} active; {moe.num_shared_experts} shared
- {attention.num_heads} query heads and {attention.num_kv_heads} key and value heads of {attention.head_dim}
- byte-level BPE of {decoder.vocab_size} tokens; context {decoder.max_context} tokens
- weights in bfloat16

## Training

- {training.steps:,} steps of {training.batch_size} x {training.sequence_length} tokens: {seen_M:.1f} M tokens seen, of
  {text.packed.num_tokens / 1e6:.1f} M in the text; k = {moe.k} throughout; dropless; float32; seed {config.run.seed}
- AdamW, peak learning rate {training.learning_rate:g}, {training.warmup_steps} steps of warm-up, then a cosine
- expert load balanced by the selection bias (step {training.balance_bias_rate:g}) and the load loss of Switch
  Transformer (weight {training.balance_loss:g})
- {finished.tokens_per_s:,.0f} tokens/s (median)

![Training curve](training_curve.png)

## Quality

Measured on the exported weights, in float32, on the whole held-out text ({len(text.held_out)} files,
{held_out_MB:.2f} MB; `assets/text`), in windows of {decoder.max_context} tokens that overlap by a quarter. Intervals
resample files; "worse" is relative to the first policy, paired by file.

{table(finished)}

`xz -9e` needs {finished.xz:.4f} bits per byte for the same text, and {finished.xz_primed:.4f} once it has read the
training text.

## Data

Python sources of these packages as installed, without generated and data-like files, held-out files, and
near-duplicates of held-out files. Each package states a permissive licence; `assets/text/LICENSES` has the licences.
The weights are released under Apache-2.0.

| source | files | MB |
|---|---|---|
{sources}
"""
