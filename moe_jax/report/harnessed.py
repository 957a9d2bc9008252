"""The results of lm-evaluation-harness under each policy, as figures and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.evaluation.intervals import Estimate, paired_difference, ratio
from moe_jax.report.figures import Figure, Row, cell, figure, markdown

_UNITS = {"bits_per_byte": "bit/byte"}
_Z95 = 1.96  # standard errors on each side of a 95% interval
_AGREE = 1e-6  # relative tolerance between the harness's figure and the ratio that is resampled


def rows(specs: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of result.json: each policy's figures and, from the second on, their differences from the first's.

    A figure is named TASK/METRIC, or TASK/METRIC/FILTER if the task filters answers; its value is the harness's own.
    If that is a mean, or a ratio of sums, over documents, the interval and the difference come from resampling
    documents, in pairs. Otherwise the interval is from the harness's standard error, and there is no difference.

    Args:
        specs: the specs of the policies.
        results: for each policy, what `lm_eval.simple_evaluate` returns, samples included.
    """
    rows = []
    for spec, result in zip(specs, results):
        figures = {}
        for task, metric, chosen in _metrics(result):
            name = "/".join([task, metric] + ([chosen] if chosen != "none" else []))
            unit = _UNITS.get(metric, "1")
            figures[name] = _figure(result, task, metric, chosen, unit)
            first, parts = _parts(results[0], task, metric, chosen), _parts(result, task, metric, chosen)
            if rows and first is not None and parts is not None:
                figures[f"{name}_difference"] = figure(paired_difference(parts[0], first[0], parts[1]), unit)
        rows.append({"policy": spec, "figures": figures})
    return rows


def _metrics(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Task or group, metric and filter of each figure; standard errors and other entries are left out."""
    keys = [(task, *key.partition(",")[::2]) for task, values in result["results"].items() for key in values]
    return [
        (task, metric, chosen)
        for task, metric, chosen in keys
        if chosen and not metric.endswith("_stderr") and _is_number(result["results"][task][f"{metric},{chosen}"])
    ]


def _figure(result: Mapping[str, Any], task: str, metric: str, chosen: str, unit: str) -> dict[str, Any]:
    value = float(result["results"][task][f"{metric},{chosen}"])
    parts = _parts(result, task, metric, chosen)
    if parts is not None:
        return figure(Estimate(value, ratio(*parts).ci95), unit)
    error = result["results"][task].get(f"{metric}_stderr,{chosen}")
    if not _is_number(error):
        return {"value": value, "unit": unit}
    return figure(Estimate(value, (value - _Z95 * error, value + _Z95 * error)), unit)


def _parts(result: Mapping[str, Any], task: str, metric: str, chosen: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Each document's part of the numerator and of the denominator; None if the figure is not a ratio of such sums."""
    samples = [sample for sample in result.get("samples", {}).get(task, ()) if sample.get("filter") == chosen]
    samples = sorted((sample for sample in samples if metric in sample), key=lambda sample: sample["doc_id"])
    values = [sample[metric] for sample in samples]
    if values and all(map(_is_number, values)):
        part_J, whole_J = np.array(values, np.float64), np.ones(len(values))
    elif values and all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):
        part_J, whole_J = np.array(values, np.float64).T
        part_J = -part_J / np.log(2) if metric == "bits_per_byte" else part_J
    else:
        return None
    value = result["results"][task][f"{metric},{chosen}"]
    if whole_J.sum() <= 0 or not np.isclose(part_J.sum() / whole_J.sum(), value, rtol=_AGREE, atol=0):
        return None
    return part_J, whole_J


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.integer, np.floating, np.bool_))


def table(rows: Sequence[Row]) -> str:
    """One line per figure and one column per policy, in Markdown; intervals are 95%."""
    names = dict.fromkeys(name for row in reversed(rows) for name in row["figures"])  # the first has no differences
    head = ["", *(f"`{row['policy']}`" for row in rows)]
    return markdown(head, ([name, *(_cell(row["figures"].get(name), name) for row in rows)] for name in names))


def _cell(shown: Figure | None, name: str) -> str:
    if shown is not None and isinstance(shown["value"], int):
        return cell(shown, "{:d}")
    return cell(shown, "{:+.3f}" if name.endswith("_difference") else "{:.3f}")
