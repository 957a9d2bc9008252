"""A model trained from scratch: figures, table, and its model card."""

import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax import files
from moe_jax.checkpoint import families
from moe_jax.config.schema import Config
from moe_jax.evaluation.intervals import paired_ratio, ratio
from moe_jax.model import parameters
from moe_jax.report.figures import Row, figure, load_figures, overflow_figure, policy_table
from moe_jax.report.plots import draw_training_curve
from moe_jax.study.pretrain import Exported


def rows(exported: Exported) -> list[Row]:
    """The rows of result.json, one for each policy; `worse_than_first` is paired by document."""
    bytes_J = exported.text.held_out.bytes_J
    first, *_ = exported.likelihoods
    rows = []
    for number, (policy, scored) in enumerate(zip(exported.compared, exported.likelihoods)):
        figures = {"bits_per_byte": figure(ratio(scored.bits_J, bytes_J), "bit/byte"), **load_figures(scored.load_LE)}
        if number:
            figures["worse_than_first"] = figure(paired_ratio(scored.bits_J, first.bits_J), "1")
        rows.append({"policy": policy.spec, "figures": figures})
    return rows


def figures(config: Config, exported: Exported, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of result.json: of the first policy and of the run."""
    return rows[0]["figures"] | {
        "xz_bits_per_byte": {"value": exported.xz, "unit": "bit/byte"},
        "xz_primed_bits_per_byte": {"value": exported.xz_primed, "unit": "bit/byte"},
        "training_tokens_per_s": {"value": exported.tokens_per_s, "unit": "token/s"},
        **overflow_figure(exported.overflow),
        "parameters": {"value": parameters.count(config.architecture), "unit": "1"},
        "active_parameters": {"value": parameters.count_active(config.architecture), "unit": "1"},
    }


def table(rows: Sequence[Row]) -> str:
    """One line per policy, in Markdown."""
    columns = {
        "held-out bits per byte (95%)": ("bits_per_byte", "{:.4f}"),
        "worse, paired (95%)": ("worse_than_first", "{:.2%}"),
        "max/mean load": ("expert_load_max_over_mean", "{:.2f}"),
        "experts unused": ("unused_experts", "{}"),
    }
    return policy_table(rows, columns)


def write(config: Config, folder: pathlib.Path, exported: Exported, rows: Sequence[Row]) -> None:
    """Writes the card and the training curve of the exported model."""
    files.write_atomically(folder / "model" / "training_curve.png", draw_training_curve(folder / "metrics.jsonl"))
    files.write_atomically(folder / "model" / "MODEL_CARD.md", model_card(config, exported, rows))


def model_card(config: Config, exported: Exported, rows: Sequence[Row]) -> str:
    """MODEL_CARD.md: what the model is, what it was trained on, and how good it is."""
    text, architecture = exported.text, config.architecture
    whole, active = parameters.count(architecture), parameters.count_active(architecture)
    moe, decoder, attention, training = config.moe, config.decoder, config.attention, config.training
    seen_M = training.steps * training.batch_size * training.sequence_length / 1e6
    held_out_MB = text.held_out.bytes_J.sum() / 1e6
    dropped = "dropless" if exported.overflow is None else f"{exported.overflow:,} slots dropped"
    sources = "\n".join(
        f"| {name} | {source.files} | {source.bytes / 1e6:.2f} |" for name, source in text.corpus.statistics.items()
    )
    return f"""# Model card

A fine-grained Mixture-of-Experts decoder, trained from scratch by `launch/train.py` and exported in the
`{families.OWN.model_type}` layout: {whole:,} parameters, {active:,} of them active per token. It continues
text like that of its sources; it knows nothing else and follows no instructions.

## Shape

- {decoder.num_layers} layers, {decoder.num_dense_layers} of them dense; model width {decoder.d_model}
- {moe.num_experts} routed experts of width {moe.expert_hidden}, {moe.k} active; {moe.num_shared_experts} shared
- {attention.num_heads} query heads and {attention.num_kv_heads} key and value heads of {attention.head_dim}
- byte-level BPE of {decoder.vocab_size} tokens; context {decoder.max_context} tokens
- weights in bfloat16

## Training

- {training.steps:,} steps of {training.batch_size} x {training.sequence_length} tokens: {seen_M:.1f} M tokens seen, of
  {text.packed.num_tokens / 1e6:.1f} M in the text; k = {moe.k} throughout; {dropped}; float32; seed {config.run.seed}
- AdamW, peak learning rate {training.learning_rate:g}, {training.warmup_steps} steps of warm-up, then a cosine
- expert load balanced by the selection bias (step {training.balance_bias_rate:g}) and the load loss of Switch
  Transformer (weight {training.balance_loss:g})
- {exported.tokens_per_s:,.0f} tokens/s (median)

![Training curve](training_curve.png)

## Quality

Measured on the exported weights, in float32, on the whole held-out text ({len(text.held_out.documents)} files,
{held_out_MB:.2f} MB; `{config.text.held_out}`), in windows of {decoder.max_context} tokens that overlap by a quarter.
Intervals resample files; "worse" is relative to the first policy, paired by file.

{table(rows)}

`xz -9e` needs {exported.xz:.4f} bits per byte for the same text, and {exported.xz_primed:.4f} once it has read the
training text.

## Data

Files of these sources, without generated and data-like ones, held-out files, and near-duplicates of held-out files.

| source | files | MB |
|---|---|---|
{sources}
"""
