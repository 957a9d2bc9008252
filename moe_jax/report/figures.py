"""What the reports share: figures in the format of result.json, tables in Markdown, and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.evaluation.intervals import Estimate
from moe_jax.text.documents import Document

Figure = Mapping[str, Any]  # `value`, `unit` and, if it is an estimate, `ci95`
Row = Mapping[str, Any]  # of result.json: `policy`, and `figures` by name


def figure(estimate: Estimate, unit: str) -> dict[str, Any]:
    """An estimate in the format of result.json."""
    return {"value": estimate.value, "unit": unit, "ci95": estimate.ci95}


def load_figures(load_LE: np.ndarray) -> dict[str, dict[str, Any]]:
    """The busiest expert's load over the mean, in the most uneven MoE layer, and the unused experts of all layers."""
    uneven = float((load_LE.max(axis=1) / load_LE.mean(axis=1)).max())
    return {
        "expert_load_max_over_mean": {"value": uneven, "unit": "1"},
        "unused_experts": {"value": int((load_LE == 0).sum()), "unit": "experts"},
    }


def overflow_figure(overflow: int | None) -> dict[str, dict[str, Any]]:
    """The slots that were kept and not computed; nothing if none can be dropped (None)."""
    return {} if overflow is None else {"overflow_slots": {"value": overflow, "unit": "slots"}}


def cell(figure: Figure | None, form: str) -> str:
    """A figure with its interval, for a table; "" if there is no figure."""
    if figure is None:
        return ""
    interval = " ({} to {})".format(*map(form.format, figure["ci95"])) if "ci95" in figure else ""
    return form.format(figure["value"]) + interval


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def policy_table(rows: Iterable[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """One line per policy, in Markdown; intervals are 95%.

    Args:
        rows: of result.json.
        columns: for each head, the name of the figure and the format of its value.
    """
    return markdown(
        ["policy", *columns],
        (
            [f"`{row['policy']}`", *(cell(row["figures"].get(name), form) for name, form in columns.values())]
            for row in rows
        ),
    )


def csv_text(head: Sequence[Any], lines: Iterable[Sequence[Any]]) -> str:
    """A header and its lines as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    return text.getvalue()


def documents_csv(documents: Sequence[Document], bits: Iterable[tuple[str, np.ndarray]]) -> str:
    """The bits of each document, one column per pair of a head and bits_J."""
    heads, bits_PJ = zip(*bits)
    lines = (
        [document.source, document.name, document.num_bytes, *(f"{bits:.6f}" for bits in bits_P)]
        for document, bits_P in zip(documents, zip(*bits_PJ))
    )
    return csv_text(["source", "name", "bytes", *heads], lines)
