"""Training from scratch: memory check, text, and the run."""

import pathlib
from typing import NamedTuple

import tokenizers
from absl import logging

from moe_jax import files, memory
from moe_jax.config.checks import require
from moe_jax.config.schema import Config
from moe_jax.model import decoder, parameters
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.text import corpus as corpora
from moe_jax.text.batches import Packed, pack
from moe_jax.text.held_out import HeldOut, load_held_out
from moe_jax.text.tokenizer import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from moe_jax.training import judging, loop
from moe_jax.training.step import NOTHING_FIXED, State, make_step, start


def require_possible(config: Config) -> None:
    """Checks that the configuration can be trained from scratch and fits in memory, before reading anything.

    The estimate is a lower bound: weights, gradients and two moments in float32, and the input of every layer for every
    token of a batch. A run that passes may still need more than there is.

    Raises:
        ValueError: it cannot be trained, or does not fit.
    """
    if config.objective.has_teacher:
        raise ValueError("objective.distillation and objective.hidden need a full model: launch/finetune.py has one")
    decoder, training = config.decoder, config.training
    require(
        training.sequence_length <= decoder.max_context,
        "training.sequence_length",
        training.sequence_length,
        f"at most decoder.max_context = {decoder.max_context}",
    )
    config.mesh.require_divides(config.architecture)
    config.mesh.require_trainable()
    config.mesh.require_batch("training.batch_size", training.batch_size)
    config.mesh.require_batch("evaluation.batch_size", config.evaluation.batch_size)
    numbers = parameters.count(config.architecture)
    weights_bytes = 16 * numbers
    batch_bytes = 4 * training.batch_size * training.sequence_length * decoder.d_model * decoder.num_layers
    memory.require(
        f"training {numbers / 1e6:,.1f} M parameters ({weights_bytes / 1e9:,.1f} GB) on batches of training.batch_size "
        f"= {training.batch_size} (at least {batch_bytes / 1e9:,.1f} GB)",
        weights_bytes + batch_bytes,
        memory.device_bytes(config.mesh.num_devices),
        "a smaller model or a smaller training.batch_size",
    )


class PretrainingText(NamedTuple):
    """The training text, packed, and the held-out text, encoded."""

    tokenizer: tokenizers.Tokenizer
    packed: Packed
    corpus: corpora.Corpus
    held_out: HeldOut


def prepare_text(config: Config, folder: pathlib.Path) -> PretrainingText:
    """Collects the text, and trains a tokenizer unless the configuration names one or the folder has one."""
    held_out = load_held_out(config.text.held_out)
    corpus = corpora.collect(config.text.sources, held_out)
    logging.info("%d documents, %.1f MB of training text", len(corpus.documents), corpus.num_bytes / 1e6)
    kept = folder / "tokenizer"  # that this run has trained
    if config.text.tokenizer:
        tokenizer = load_tokenizer(config.text.tokenizer)
    elif kept.exists():
        tokenizer = load_tokenizer(kept)
    else:
        tokenizer = train_tokenizer((document.text for document in corpus.documents), config.text.vocab_size)
        with files.replaced_folder(kept) as partial:
            save_tokenizer(tokenizer, partial, config.decoder.max_context)
    if tokenizer.get_vocab_size() > config.decoder.vocab_size:
        raise ValueError(
            f"decoder.vocab_size = {config.decoder.vocab_size}: expected at least the tokenizer's "
            f"{tokenizer.get_vocab_size()}"
        )
    packed = pack(encode_documents(tokenizer, corpus.documents), config.training.sequence_length)
    logging.info("%.2f M tokens, rows filled to %.1f%%", packed.num_tokens / 1e6, 100 * packed.fill_fraction)
    return PretrainingText(tokenizer, packed, corpus, HeldOut(held_out, encode_documents(tokenizer, held_out)))


def train(config: Config, folder: pathlib.Path, text: PretrainingText, execution: decoder.Execution) -> decoder.Params:
    """Trains from scratch (see `loop.run`) and returns the parameters after the last step."""
    training = config.training
    live = policies.settings([MODEL_OWN] * training.batch_size, execution.architecture, execution.k_max)
    watched = text.held_out.first_bytes(training.evaluate_bytes)

    def judge(state: State) -> float:
        return judging.bits_per_byte(config, state.all_params(), watched, [MODEL_OWN], execution)

    task = loop.TrainingTask(
        start(execution, training, config.run.seed),
        NOTHING_FIXED,
        make_step(execution, training, config.objective),
        lambda step: live,
        judge,
        text.packed,
        {"text.sources": text.corpus.sha256},
    )
    return loop.run(config, folder, task).state.all_params()
