"""Exports a model trained from scratch, and measures the export."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax import checkpoint
from moe_jax.config.schema import Config
from moe_jax.evaluation.likelihood import Likelihood, score_documents, xz_bits_per_byte
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import sharding_of
from moe_jax.routing.policies import Policy
from moe_jax.study.compare import compared_policies
from moe_jax.training import loop
from moe_jax.training.pretraining import PretrainingText


class Exported(NamedTuple):
    """The results of an exported model on the held-out text."""

    compared: Sequence[Policy]
    likelihoods: Sequence[Likelihood]  # of each policy
    text: PretrainingText
    xz: float  # bits per byte of the same text by `xz -9e`
    xz_primed: float  # the same, after the compressor has read the training text
    tokens_per_s: float  # in training, median over the run
    overflow: int | None  # slots that the run dropped; None: none can be


def export(
    config: Config, folder: pathlib.Path, text: PretrainingText, execution: Execution, params: Params
) -> Exported:
    """Exports the trained model with its tokenizer to `folder/model`, in bfloat16, and measures the export."""
    new = checkpoint.new(config.architecture, text.tokenizer)
    new.save(folder / "model", params, dtype="bfloat16", replace=True)
    exported_params = checkpoint.open(folder / "model").load("float32", sharding_of(execution.layout))
    compared = compared_policies(config.evaluation, execution.architecture, execution.k_max)
    likelihoods = score_documents(
        exported_params,
        text.held_out.tokens,
        compared,
        execution.exact,
        context=config.decoder.max_context,
        batch_size=config.evaluation.batch_size,
        progress="likelihood",
    )
    held_out, training = (
        [document.text.encode() for document in documents]
        for documents in (text.held_out.documents, text.corpus.documents)
    )
    return Exported(
        compared,
        likelihoods,
        text,
        xz_bits_per_byte(held_out),
        xz_bits_per_byte(held_out, primer=training),
        loop.median_tokens_per_s(folder),
        loop.overflow_slots(folder),
    )
