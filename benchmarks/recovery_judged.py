"""Choices and completions of the original, the control and the tuned models, side by side and in pairs."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import moe_jax
from moe_jax.config.schema import Config
from moe_jax.engine.request import execution_of
from moe_jax.evaluation import choices, completions
from moe_jax.evaluation.intervals import paired_difference, ratio
from moe_jax.evaluation.journal import Journal, identity
from moe_jax.report.figures import cell, figure, markdown
from moe_jax.routing.policies.parse import parse
from moe_jax.study import compare
from moe_jax.text.documents import Document
from moe_jax.text.tokenizer import load_tokenizer


class Judged(NamedTuple):
    """One model at one k, by document: right answers, and greedy and sampled completions that parse."""

    right_J: np.ndarray
    greedy_J: np.ndarray
    sampled_J: np.ndarray
    asked_J: np.ndarray  # questions
    headed_J: np.ndarray  # headers


def judge(config: Config, out: pathlib.Path, folder: pathlib.Path, spec: str, documents: Sequence[Document]) -> Judged:
    """Asks a model all questions of the documents. Parts are kept in `out`, so that a killed run can continue."""
    model = moe_jax.load(folder, dtype="float32", calibration=None)
    tokenizer, execution = load_tokenizer(folder), execution_of(model.architecture, 8)
    task = compare.prepare(config.evaluation, config.run.seed, documents, tokenizer, execution)
    compared, shared = [parse(spec)], {"execution": execution}
    asked = dataclasses.replace(config, policy=dataclasses.replace(config.policy, spec=spec))
    shared["journal"] = Journal(out / "judged", identity(asked, [folder], execution.implementations))
    per_byte = choices.score_options(
        model.params, task.questions, compared, batch_size=config.evaluation.batch_size, **shared
    )
    settings = {"max_new_tokens": config.evaluation.completion_tokens, "seed": config.run.seed}
    parses = completions.complete(model.engine, tokenizer, task.headers, compared, **settings, **shared)[0]
    count = len(task.held_out.documents)
    asked_by = np.array([question.document for question in task.questions])
    headed_by = np.array([header.document for header in task.headers])
    return Judged(
        np.bincount(asked_by, choices.is_right(per_byte)[0], count),
        *(np.bincount(headed_by, one, count) for one in parses),
        np.bincount(asked_by, minlength=count),
        np.bincount(headed_by, minlength=count),
    )


def table(judged: Mapping[str, Judged], first: str) -> str:
    """One line per model, with its difference from `first`, paired by document; intervals are 95%."""
    kinds = {"next-line choice": ("right_J", "asked_J"), "parses, greedy": ("greedy_J", "headed_J")}
    kinds["parses, T=0.8"] = ("sampled_J", "headed_J")
    lines = []
    for name, one in judged.items():
        cells = [name]
        for part, whole in kinds.values():
            values, reference, counts = (
                getattr(model, field) for model, field in ((one, part), (judged[first], part), (one, whole))
            )
            cells.append(cell(figure(ratio(values, counts), "1"), "{:.3f}"))
            more = paired_difference(values, reference, counts)
            cells.append("" if name == first else cell(figure(more, "1"), "{:+.3f}"))
        lines.append(cells)
    return markdown(["model", *(head for kind in kinds for head in (kind, "difference"))], lines)
