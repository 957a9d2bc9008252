"""What each policy costs in quality: the measurements of one model, as figures and as a table."""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moe_jax import files
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import EvaluationConfig
from moe_jax.engine.generate import Engine
from moe_jax.evaluation import choices, completions, likelihood
from moe_jax.evaluation.intervals import Estimate, paired_difference, paired_ratio, ratio
from moe_jax.evaluation.journal import Journal
from moe_jax.model.decoder import Execution
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.text.corpus import Document, half
from moe_jax.text.tokenizer import encode_documents

LONGEST_WINDOW = 2048  # tokens, unless evaluation.context is set: contexts are up to a hundred times longer


class Task(NamedTuple):
    """What every policy is measured on, prepared and checked before anything is computed."""

    documents: Sequence[Document]
    tokens: Sequence[np.ndarray]
    questions: Sequence[choices.Question]
    headers: Sequence[completions.Header]
    compared: Sequence[policies.Policy]


class Measured(NamedTuple):
    """The results of every policy on each document, question and header."""

    likelihoods: Sequence[likelihood.Likelihood]
    right: np.ndarray  # bool [policies, questions]
    parses: np.ndarray  # bool [policies, greedy and sampled, headers]


def prepare(
    config: EvaluationConfig,
    seed: int,
    documents: Sequence[Document],
    tokenizer,
    execution: Execution,
    calibration: Calibration | None = None,
) -> Task:
    """Draws questions and headers, and checks the policies against the model.

    Raises:
        ValueError: a policy does not fit the model, the model's context is too short, or the text has too few lines or
            functions.
    """
    context = execution.architecture.decoder.max_context
    if config.context > context:
        raise ValueError(f"evaluation.context = {config.context}: expected at most the model's context, {context}")
    for asked, setting, needed in (
        (config.choice_questions, "choice_questions", choices.ROW),
        (config.completion_headers, "completion_headers", completions.PROMPT + config.completion_tokens),
    ):
        if asked and context < needed:
            raise ValueError(
                f"the model's context is {context} tokens: expected at least {needed}, or evaluation.{setting}=0"
            )
    compared = [parse(spec, calibration) for spec in config.policies]
    policies.settings(compared, execution.architecture, execution.k_max)
    for policy in compared:
        if policy.batch_aware:
            raise ValueError(
                f"evaluation.policies: {policy.spec!r} looks at all rows of a decode step; expected policies that look "
                "at one row; launch/sweep.py measures the others at every load"
            )
    documents = half(documents, config.half)[: config.documents or None]
    return Task(
        documents,
        encode_documents(tokenizer, documents),
        choices.make_questions(documents, tokenizer, config.choice_questions, seed),
        completions.make_headers(documents, tokenizer, config.completion_headers, seed),
        compared,
    )


def measure(
    config: EvaluationConfig, seed: int, task: Task, engine: Engine, tokenizer, execution: Execution, journal: Journal
) -> Measured:
    """Runs every measurement under every policy, except those that the journal already holds."""
    context = window_of(config, execution.architecture)
    shared = {"execution": execution, "journal": journal}
    scored, reference = _with_full(task.compared, execution.architecture)

    def bar(total, name, unit):
        return tqdm(total=total, desc=name, unit=unit, disable=None)

    with bar(likelihood.num_windows(task.tokens, context), "likelihood", "window") as progress:
        settings = {"context": context, "batch_size": config.batch_size, "reference": reference}
        likelihoods = likelihood.score_documents(
            engine.params, task.tokens, scored, advance=progress.update, **settings, **shared
        )
    with bar(len(task.questions), "choices", "question") as progress:
        per_byte = choices.score_options(
            engine.params,
            *(task.questions, task.compared),
            batch_size=config.batch_size,
            advance=progress.update,
            **shared,
        )
    with bar(2 * len(task.headers) * len(task.compared), "completions", "text") as progress:
        parses = completions.complete(
            *(engine, tokenizer, task.headers, task.compared),
            max_new_tokens=config.completion_tokens,
            seed=seed,
            advance=progress.update,
            **shared,
        )
    return Measured(likelihoods[: len(task.compared)], choices.is_right(per_byte), parses)


def window_of(config: EvaluationConfig, architecture: Architecture) -> int:
    """The window length, in tokens, into which longer documents are cut."""
    return config.context or min(architecture.decoder.max_context, LONGEST_WINDOW)


def _with_full(compared: Sequence[policies.Policy], architecture: Architecture) -> tuple[list[policies.Policy], int]:
    """The policies and the index of the full model among them; it is added if missing."""
    for number, policy in enumerate(compared):
        if policies.uniform_k(policy, architecture) == architecture.moe.k:
            return list(compared), number
    return [*compared, MODEL_OWN], len(compared)


def rows(task: Task, measured: Measured) -> list[dict[str, Any]]:
    """The rows of result.json: each policy's figures and, from the second on, their differences from the first's.

    Differences are paired by document. `bits_per_byte_increase` is a fraction of the first policy's bits per byte; the
    others have the unit of their figure. What nothing was asked for has no figure.
    """
    sizes = np.array([len(document.text.encode()) for document in task.documents])
    count = len(sizes)
    asked = np.array([question.document for question in task.questions], int)
    headed = np.array([header.document for header in task.headers], int)
    asked_J, headed_J = np.bincount(asked, minlength=count), np.bincount(headed, minlength=count)

    def rates(policy: int) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        greedy, sampled = (np.bincount(headed, parses, count) for parses in measured.parses[policy])
        found = [
            ("choice_accuracy", "1", np.bincount(asked, measured.right[policy], count), asked_J),
            ("completion_parse_rate", "1", greedy, headed_J),
            ("completion_parse_rate_sampled", "1", sampled, headed_J),
        ]
        return [rate for rate in found if rate[-1].any()]

    found = []
    for policy, spec in enumerate(task.compared):
        one, first = measured.likelihoods[policy], measured.likelihoods[0]
        figures = {
            "bits_per_byte": figure(ratio(one.bits_J, sizes), "bit/byte"),
            "kl_to_full": figure(ratio(one.kl_J, one.tokens_J), "nat/token"),
            "expert_load_max_over_mean": {"value": load_max_over_mean(one.load_LE), "unit": "1"},
            "unused_experts": {"value": int((one.load_LE == 0).sum()), "unit": "experts"},
        }
        figures |= {name: figure(ratio(part, whole), unit) for name, unit, part, whole in rates(policy)}
        if policy:
            figures["bits_per_byte_increase"] = figure(paired_ratio(one.bits_J, first.bits_J), "1")
            for (name, unit, part, whole), (_, _, reference, _) in zip(rates(policy), rates(0)):
                figures[f"{name}_difference"] = figure(paired_difference(part, reference, whole), unit)
        found.append({"policy": spec.spec, "figures": figures})
    return found


def load_max_over_mean(load_LE: np.ndarray) -> float:
    """The busiest expert's load over the mean, in the most uneven MoE layer."""
    return float((load_LE.max(axis=1) / load_LE.mean(axis=1)).max())


def figure(estimate: Estimate, unit: str) -> dict[str, Any]:
    """An estimate in the format of result.json."""
    return {"value": estimate.value, "unit": unit, "ci95": estimate.ci95}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per policy, in Markdown, with the columns that have figures; intervals are 95%."""
    columns = {
        "bits per byte": ("bits_per_byte", "{:.3f}"),
        "increase, paired": ("bits_per_byte_increase", "{:+.2%}"),
        "KL to full": ("kl_to_full", "{:.3f}"),
        "next-line choice": ("choice_accuracy", "{:.3f}"),
        "difference": ("choice_accuracy_difference", "{:+.3f}"),
        "parses, greedy": ("completion_parse_rate", "{:.3f}"),
        "parses, T=0.8": ("completion_parse_rate_sampled", "{:.3f}"),
        "max/mean load": ("expert_load_max_over_mean", "{:.2f}"),
    }
    columns = {title: one for title, one in columns.items() if any(one[0] in row["figures"] for row in rows)}
    lines = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [cell(row["figures"].get(name), form) for name, form in columns.values()]
        lines.append(f"| `{row['policy']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(figure: dict[str, Any] | None, form: str) -> str:
    """A figure with its interval, for a table; "" if there is no figure."""
    if figure is None:
        return ""
    interval = " ({} to {})".format(*map(form.format, figure["ci95"])) if "ci95" in figure else ""
    return form.format(figure["value"]) + interval


def write_details(folder: pathlib.Path, task: Task, measured: Measured) -> None:
    """Writes `documents.csv`, each document's bits under each policy, and `expert_load.csv`, each expert's slots."""
    specs = [policy.spec for policy in task.compared]
    document_lines = [
        [document.source, document.name, len(document.text.encode()), *(f"{bits:.6f}" for bits in bits_P)]
        for document, bits_P in zip(task.documents, zip(*(one.bits_J for one in measured.likelihoods)))
    ]
    write_csv(folder / "documents.csv", ["source", "name", "bytes", *specs], document_lines)
    expert_lines = [
        [spec, layer, *load_E]
        for spec, one in zip(specs, measured.likelihoods)
        for layer, load_E in enumerate(one.load_LE.tolist())
    ]
    num_experts = measured.likelihoods[0].load_LE.shape[1]
    write_csv(folder / "expert_load.csv", ["policy", "moe_layer", *range(num_experts)], expert_lines)


def write_csv(path: pathlib.Path, head: list, lines: list[list]) -> None:
    """Writes a header and its lines, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    files.write_atomically(path, text.getvalue())
