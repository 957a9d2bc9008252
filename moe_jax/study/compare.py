"""Compares policies side by side on held-out text: likelihood, choices of the next line, and completions."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import EvaluationConfig
from moe_jax.engine.generate import Engine
from moe_jax.evaluation import choices, completions, likelihood
from moe_jax.evaluation.journal import Journal
from moe_jax.model.execution import Execution
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.text.documents import Document
from moe_jax.text.held_out import HeldOut, half
from moe_jax.text.tokenizer import encode_documents

LONGEST_WINDOW = 2048  # tokens, unless evaluation.context is set: contexts are up to a hundred times longer


class Task(NamedTuple):
    """What every policy is measured on, prepared and checked before anything is computed."""

    held_out: HeldOut
    questions: Sequence[choices.Question]
    headers: Sequence[completions.Header]
    compared: Sequence[policies.Policy]
    drops: bool  # whether slots may be dropped


class Measured(NamedTuple):
    """The results of every policy on each document, question and header."""

    likelihoods: Sequence[likelihood.Likelihood]
    right: np.ndarray  # bool [policies, questions]
    parses: np.ndarray  # bool [policies, greedy and sampled, headers]
    names: Sequence[str]  # of what was measured: the policy's spec, and the dtype of experts where there are several


def joined(parts: Sequence[Measured]) -> Measured:
    """The measurements of several sets of weights, one after the other."""
    likelihoods, right, parses, names = zip(*parts)
    in_order = itertools.chain.from_iterable
    return Measured([*in_order(likelihoods)], np.concatenate(right), np.concatenate(parses), [*in_order(names)])


def compared_policies(
    config: EvaluationConfig, architecture: Architecture, k_max: int, calibration: Calibration | None = None
) -> list[policies.Policy]:
    """Parses the policies and checks that they can be compared on whole texts, before hours of work.

    Args:
        config: reads `policies`.
        architecture: the model's architecture.
        k_max: static slots per token.
        calibration: the model's calibration, for policies that need one.

    Raises:
        ValueError: a policy does not parse or does not fit the model, or it looks at all rows of a decode step, of
            which the likelihood of a whole text has none.
    """
    compared = [parse(spec, calibration) for spec in config.policies]
    policies.settings(compared, architecture, k_max)
    for policy in compared:
        if policy.batch_aware:
            raise ValueError(
                f"evaluation.policies has {policy.spec!r}, which looks at all rows of a decode step: expected policies "
                "that look at one row; launch/sweep.py measures the others at every concurrency"
            )
    return compared


def prepare(
    config: EvaluationConfig,
    seed: int,
    documents: Sequence[Document],
    tokenizer,
    execution: Execution,
    calibration: Calibration | None = None,
) -> Task:
    """Picks questions and headers, and checks the policies against the model.

    Raises:
        ValueError: `compared_policies` refuses a policy, the model's context is too short, the text has too few lines
            or functions, or slots may be dropped where they are not counted.
    """
    context = execution.architecture.decoder.max_context
    if config.context > context:
        raise ValueError(f"evaluation.context = {config.context}: expected at most the model's context, {context}")
    if execution.dispatch.drops and (config.choice_questions or config.completion_headers):
        raise ValueError(
            f"mesh.capacity = {execution.layout.capacity}: expected 0, or evaluation.choice_questions=0 and "
            "evaluation.completion_headers=0: of those, dropped slots are not counted"
        )
    for asked, setting, needed in (
        (config.choice_questions, "choice_questions", choices.ROW),
        (config.completion_headers, "completion_headers", completions.PROMPT + config.completion_tokens),
    ):
        if asked and context < needed:
            raise ValueError(
                f"the model's context is {context} tokens: expected at least {needed}, or evaluation.{setting}=0"
            )
    compared = compared_policies(config, execution.architecture, execution.k_max, calibration)
    documents = half(documents, config.half)[: config.documents or None]
    return Task(
        HeldOut(documents, encode_documents(tokenizer, documents)),
        choices.make_questions(documents, tokenizer, config.choice_questions, seed),
        completions.make_headers(documents, tokenizer, config.completion_headers, seed),
        compared,
        execution.dispatch.drops,
    )


def measure(
    config: EvaluationConfig,
    seed: int,
    task: Task,
    engine: Engine,
    tokenizer,
    execution: Execution,
    journal: Journal,
    weights: str = "",
) -> Measured:
    """Runs every measurement under every policy, except those that the journal already holds.

    `weights` says which weights these are, in names.
    """
    with_full, reference = _with_full(task.compared, execution.architecture)
    likelihoods = likelihood.score_documents(
        engine.params,
        task.held_out.tokens,
        with_full,
        execution,
        context=window_of(config, execution.architecture),
        batch_size=config.batch_size,
        reference=reference,
        journal=journal,
        progress="likelihood",
    )
    per_byte = choices.score_options(
        engine.params, task.questions, task.compared, execution, batch_size=config.batch_size, journal=journal
    )
    parses = completions.complete(
        engine,
        tokenizer,
        task.headers,
        task.compared,
        execution,
        max_new_tokens=config.completion_tokens,
        seed=seed,
        journal=journal,
    )
    names = [policy.spec + (f", {weights}" if weights else "") for policy in task.compared]
    return Measured(likelihoods[: len(task.compared)], choices.is_right(per_byte), parses, names)


def window_of(config: EvaluationConfig, architecture: Architecture) -> int:
    """The window length, in tokens, into which longer documents are cut."""
    return config.context or min(architecture.decoder.max_context, LONGEST_WINDOW)


def _with_full(compared: Sequence[policies.Policy], architecture: Architecture) -> tuple[list[policies.Policy], int]:
    """The policies and the index of the full model among them; it is added if missing."""
    for number, policy in enumerate(compared):
        if policies.uniform_k(policy, architecture) == architecture.moe.k:
            return list(compared), number
    return [*compared, MODEL_OWN], len(compared)
