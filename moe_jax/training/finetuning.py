"""Fine-tunes a loaded model so that it does with fewer experts what it did with all: text, memory, the run."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from moe_jax import memory
from moe_jax.checkpoint import Checkpoint
from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import Config, TextConfig
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import on_all, placed
from moe_jax.routing import mask, policies
from moe_jax.routing.policies import Policy
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.text import corpus as corpora
from moe_jax.text.batches import Packed, pack
from moe_jax.text.chat import load_renderer
from moe_jax.text.documents import Document
from moe_jax.text.framing import frame_documents, outer_ids
from moe_jax.text.held_out import HeldOut, half, load_held_out
from moe_jax.text.near_duplicates import HeldOutIndex
from moe_jax.training import judging, loop, trainable
from moe_jax.training.elastic import KSampler
from moe_jax.training.objective import Teacher
from moe_jax.training.optimizer import with_selection_bias, without_selection_bias
from moe_jax.training.step import Fixed, State, make_step, state_of

FEW_DOCUMENTS = 10  # 95% intervals from resampling cover less with few documents: 89% with 10, 76% with 3


class FinetuningText(NamedTuple):
    """The training text, packed, and the two halves of the held-out text."""

    packed: Packed
    digest: str
    num_documents: int
    watched: HeldOut  # the even files: they decide which state is best and when to stop
    reported: HeldOut  # the odd files: results are measured on them


class OtherTeacher(NamedTuple):
    """The model of `finetune.teacher`: the trained one is compared with it, instead of with itself as loaded."""

    model: Checkpoint
    params: Params
    execution: Execution


class Tuned(NamedTuple):
    """A finished run."""

    params: Params  # of the best state, LoRA and mask merged
    step: int  # of the best state
    steps: int  # steps of the run
    masked_experts: int  # in all layers


def trained_policy(config: Config, architecture: Architecture, calibration=None) -> Policy:
    """The policy to train under; the model's own if k is sampled.

    Raises:
        ValueError: the policy does not fit the model or looks at other rows of a decode step, or there is nothing to
            recover.
    """
    policy = MODEL_OWN if config.finetune.elastic else parse(config.policy.spec, calibration)
    if policy.batch_aware:
        raise ValueError(
            f"policy.spec = {policy.spec!r} looks at all rows of a decode step, and training reads whole texts: "
            "expected a policy that looks at one row"
        )
    keeps_all = policies.uniform_k(policy, architecture) == architecture.moe.k
    if keeps_all and not config.finetune.elastic and not config.finetune.teacher:
        if not config.objective.language_model and not config.objective.sparsity:
            raise ValueError(
                f"policy.spec = {policy.spec!r} keeps all {architecture.moe.k} experts, so there is nothing to "
                "recover: expected fewer, as topk:4, or finetune.elastic=True, or objective.language_model above 0"
            )
        logging.warning("policy.spec = %r keeps all experts: there is nothing to recover", policy.spec)
    if config.finetune.mask and not config.objective.sparsity:
        logging.warning("finetune.mask has no effect while objective.sparsity is 0")
    return policy


def require_teacher(config: Config, model: Checkpoint, teacher: Checkpoint) -> None:
    """Checks that the model of `finetune.teacher` can teach the trained one.

    Raises:
        ValueError: the objective has no teacher; the two differ in their vocabulary or tokenizer, or in their width if
            the objective compares hidden states; or rows of training text are longer than the teacher's context.
    """
    given = f"finetune.teacher = {config.finetune.teacher!r}"
    if not config.objective.has_teacher:
        raise ValueError(f"{given}: expected objective.distillation or objective.hidden above 0, which compare with it")
    own, other = model.architecture.decoder, teacher.architecture.decoder
    if other.vocab_size != own.vocab_size:
        raise ValueError(
            f"{given} has a vocabulary of {other.vocab_size} tokens: expected the model's {own.vocab_size}"
        )
    if teacher.require_tokenizer().to_str() != model.require_tokenizer().to_str():
        raise ValueError(f"{given}: expected a model with the tokenizer of model.path")
    if config.objective.hidden and other.d_model != own.d_model:
        raise ValueError(f"{given} has states of width {other.d_model}: expected {own.d_model}, or objective.hidden=0")
    if config.training.sequence_length > other.max_context:
        raise ValueError(
            f"training.sequence_length = {config.training.sequence_length}: expected at most the {other.max_context} "
            "tokens of the context of finetune.teacher"
        )


def prepare_text(config: Config, model: Checkpoint) -> FinetuningText:
    """Collects the text, holds some of it out, and packs the rest.

    Args:
        config: reads `text`, `training` and `evaluation.documents`, the number of reported documents.
        model: its files define the tokens around a text, and the chat template.

    Raises:
        ValueError: `corpus.collect` refuses a source, or there is too little text.
    """
    training, tokenizer, context = config.training, model.require_tokenizer(), model.architecture.decoder.max_context
    if training.sequence_length > context:
        raise ValueError(
            f"training.sequence_length = {training.sequence_length}: expected at most the model's context of {context} "
            "tokens"
        )
    begin_id, end_id = outer_ids(model.folder, tokenizer, model.token_ids)
    documents, digest, held_out = _documents(
        config.text, config.finetune.held_out_fraction, load_renderer(model.folder)
    )
    packed = pack(
        frame_documents(tokenizer, documents, begin_id, end_id), training.sequence_length, begin_id, begin_id != end_id
    )
    rows = training.batch_size * training.accumulation
    if packed.num_rows < rows:
        raise ValueError(
            f"text.sources has {packed.num_tokens:,} tokens, {packed.num_rows} rows of training.sequence_length = "
            f"{training.sequence_length}: expected at least the {rows} rows of one step; name more text, or lower "
            "training.batch_size"
        )
    logging.info("%d documents, %.2f M tokens", len(documents), packed.num_tokens / 1e6)
    watched, reported = half(held_out, "even"), half(held_out, "odd")
    halves = watched, reported[: config.evaluation.documents or None]
    held = [HeldOut(documents, frame_documents(tokenizer, documents, begin_id, end_id)) for documents in halves]
    return FinetuningText(packed, digest, len(documents), *held)


def _documents(text: TextConfig, fraction: float, chat) -> tuple[Sequence[Document], str, Sequence[Document]]:
    if text.held_out:
        held_out = load_held_out(text.held_out, chat)
        corpus = corpora.collect(text.sources, held_out, chat)
        training = corpus.documents
    else:
        corpus = corpora.collect(text.sources, (), chat)
        by_digest = sorted(corpus.documents, key=lambda document: document.sha256)
        count = max(2, math.ceil(fraction * len(by_digest)), min(2 * FEW_DOCUMENTS, len(by_digest) // 5))
        held_out = by_digest[:count]
        index = HeldOutIndex(held_out)
        training = tuple(document for document in corpus.documents if not index.resembles(document))
    if len(held_out) < 2 or not training:
        raise ValueError(
            f"text.sources has {len(corpus.documents)} documents, and {len(held_out)} are held out (text.held_out = "
            f"{text.held_out!r}): expected at least 2 held out, one to choose by and one to report, and others to "
            "train on"
        )
    if len(held_out) < 2 * FEW_DOCUMENTS:
        logging.warning(
            "%d documents are held out, and half are reported: with fewer than %d reported, intervals are too narrow",
            len(held_out),
            FEW_DOCUMENTS,
        )
    return training, corpus.sha256, held_out


def require_memory(config: Config, params: Params) -> None:
    """Checks that fine-tuning fits in memory, before taking any.

    The estimate, beside the model itself, is a lower bound: a copy of the trained weights, their gradients and two
    moments in float32, the input of every layer for every token, and with LoRA the merged model. A run that passes may
    still need more than there is.

    Raises:
        ValueError: it does not fit.
    """
    shapes = jax.eval_shape(lambda: _divided(config, params)[0])
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    copies_bytes = trainable.num_bytes(shapes)
    if config.finetune.train == "lora":
        copies_bytes += trainable.num_bytes(params)  # the merged model, for the export
    training = config.training
    numbers = sum(params[stack]["ffn_norm_LD"].size for stack in layer_order.moe_stacks(params))
    batch_bytes = training.batch_size * training.sequence_length * numbers * params["norm_D"].dtype.itemsize
    needed_bytes = copies_bytes + 12 * weights + batch_bytes
    model_bytes = trainable.num_bytes(params)
    logging.info(
        "training takes %.2f GB beside the model's %.2f: %.1f M weights train%s",
        *(needed_bytes / 1e9, model_bytes / 1e9, weights / 1e6),
        f", and {config.finetune.teacher or 'the model as loaded'} is the teacher"
        if config.objective.has_teacher
        else "",
    )
    memory.require(
        f"finetune.train = {config.finetune.train!r}, beside the model's {model_bytes / 1e9:,.1f} GB,",
        needed_bytes,
        memory.device_bytes(config.mesh.num_devices),
        "fewer weights, as with finetune.train=lora, training.weights=bfloat16, or a smaller training.batch_size",
    )


def _divided(config: Config, params: Params) -> tuple[Params, Params, dict[str, jax.Array]]:
    without, biases = without_selection_bias(params)
    trained, frozen = trainable.divide(without, config.finetune, config.training.weights, config.run.seed)
    return trained, frozen, biases


def start(config: Config, params: Params) -> tuple[State, Params]:
    """The state before the first step, and the parameters that do not train."""
    trained, frozen, biases = _divided(config, params)
    return state_of(trained, {stack: bias_LE + 0 for stack, bias_LE in biases.items()}, config.training), frozen


def kept_experts(execution: Execution, settings: policies.Settings) -> Execution:
    """The execution of a step that trains under a policy: with as many slots as it keeps at most."""
    return dataclasses.replace(execution, k_max=int(settings.columns_BL["k"].max()))


def finetune(
    config: Config,
    folder: pathlib.Path,
    params: Params,
    text: FinetuningText,
    policy: Policy,
    execution: Execution,
    other: OtherTeacher | None = None,
) -> Tuned:
    """Runs fine-tuning (see `loop.run`) and returns the state that was best on the watched half.

    Args:
        config: reads `training`, `objective` and `finetune`.
        folder: the run's folder.
        params: the model's weights as loaded; left unchanged, and the teacher's if the objective has one.
        text: from `prepare_text`.
        policy: from `trained_policy`.
        execution: static settings of the full model.
        other: another teacher, which `require_teacher` accepts.
    """
    training, architecture, rows = config.training, execution.architecture, config.training.batch_size
    if config.finetune.elastic:
        live = KSampler(config.finetune, architecture, rows, config.run.seed).live
        kept = execution
    else:
        settings = policies.settings([policy] * rows, architecture, execution.k_max)
        kept = kept_experts(execution, settings)

        def live(step: int):
            return settings

    state, frozen = start(config, params)
    teacher = None
    if config.objective.has_teacher:
        full_params, full_execution = other[1:] if other else (params, execution)
        own, alone = as_teacher(full_execution, rows)
        teacher = Teacher(full_params, on_all(own, alone.layout), alone)
    lora_scale = config.finetune.lora_alpha / config.finetune.lora_rank
    judged_under = _judged_under(config, policy, architecture)
    watched = text.watched.first_bytes(training.evaluate_bytes)

    def judge(state: State) -> float:
        whole = with_selection_bias(trainable.join(state.params, frozen, lora_scale), state.biases)
        return judging.bits_per_byte(config, whole, watched, judged_under, execution)

    digests = {"text.sources": text.digest, "text.held_out": _digest(text), "model.path": trainable.digest(params)}
    if other is not None:
        digests["finetune.teacher"] = trainable.digest(other.params)
    task = loop.TrainingTask(
        placed(state, execution.layout),
        Fixed(frozen, teacher),
        make_step(kept, training, config.objective, lora_scale),
        live,
        judge,
        text.packed,
        digests,
        keep_best=True,
        patience=config.finetune.patience,
    )
    outcome = loop.run(config, folder, task)
    best = with_selection_bias(trainable.merge_all(outcome.state.params, frozen, lora_scale), outcome.state.biases)
    masks = [best[stack]["router"].get("mask_LE", np.ones(1)) for stack in layer_order.moe_stacks(best)]
    masked_experts = sum(int((mask_LE <= 0).sum()) for mask_LE in masks)
    return Tuned(mask.merge(best), outcome.step, outcome.steps, masked_experts)


def as_teacher(execution: Execution, rows: int) -> tuple[policies.Settings, Execution]:
    """How a full model runs as the teacher of `rows` rows: with its own k, and it drops no slot."""
    architecture = execution.architecture
    own = policies.settings([MODEL_OWN] * rows, architecture, architecture.moe.k)
    return own, dataclasses.replace(execution.exact, k_max=architecture.moe.k)


def _digest(text: FinetuningText) -> str:
    """SHA-256 of the held-out text."""
    digest = hashlib.sha256()
    for tokens in (*text.watched.tokens, *text.reported.tokens):
        digest.update(np.asarray(tokens, np.int64).tobytes() + b"/")
    return digest.hexdigest()


def _judged_under(config: Config, policy: Policy, architecture: Architecture) -> list[Policy]:
    """The trained policy; if k is sampled, the smallest k, the middle one and the largest."""
    if not config.finetune.elastic:
        return [policy]
    least, most = config.finetune.k_min, architecture.moe.k
    return [parse(f"topk:{k}") for k in sorted({least, (least + most) // 2, most})]
