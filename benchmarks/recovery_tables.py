"""Summarises the finished runs of recovery.py, as Markdown and as figures."""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.evaluation.intervals import Estimate, paired_ratio, ratio, recovered

FULL = "model"


class Run(NamedTuple):
    """A finished run: its figures, and the bits of each reported document before and after, by policy."""

    result: dict[str, Any]
    watched: float  # its lowest bits per byte, on the half of the documents used for selection
    sizes_J: np.ndarray
    before: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]


def read_runs(folder: pathlib.Path, names: Sequence[str]) -> dict[str, Run]:
    """Reads the finished runs among `names`."""
    runs = {}
    for name in names:
        if not (folder / name / "result.json").exists():
            continue
        with open(folder / name / "documents.csv", newline="") as file:
            head, *lines = csv.reader(file)
        columns = {
            title: np.array([float(line[place]) for line in lines]) for place, title in enumerate(head) if place > 1
        }
        before_and_after = [
            {title.removeprefix(f"{when} "): bits for title, bits in columns.items() if title.startswith(f"{when} ")}
            for when in ("before", "after")
        ]
        result = json.loads((folder / name / "result.json").read_text())
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        watched = min(line["bits_per_byte"] for line in lines if "bits_per_byte" in line)
        runs[name] = Run(result, watched, columns["bytes"], *before_and_after)
    return runs


def _percent(estimate: Estimate, signed: bool = True) -> str:
    form = "{:+.2%}" if signed else "{:.0%}"
    return "{} ({} to {})".format(*map(form.format, (estimate.value, *estimate.ci95)))


def _bits(estimate: Estimate) -> str:
    return f"{estimate.value:.4f}"


def _minutes(run: Run) -> str:
    return f"{run.result['seconds'] / 60:.0f}"


def short_runs(runs: Mapping[str, Run], names: Sequence[str], policy: str = "topk:4") -> str:
    """One line per run: its result at `policy` and with all experts.

    Sorted by the watched half, best first; the other columns are of the reported half.
    """
    rows = []
    for name in (name for name in names if name in runs):
        run = runs[name]
        share = recovered(run.before[policy], run.after[policy], run.before[FULL])
        cells = [
            f"`{name}`",
            f"{run.watched:.4f}",
            _bits(ratio(run.after[policy], run.sizes_J)),
            _percent(share, signed=False),
            _percent(paired_ratio(run.after[FULL], run.before[FULL])),
            _minutes(run),
        ]
        rows.append((run.watched, f"| {' | '.join(cells)} |"))
    head = f"| run | watched | bits per byte at `{policy}` | won back | change with all experts | minutes |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(line for _, line in sorted(rows))])


def control_rates(runs: Mapping[str, Run], names: Sequence[str]) -> str:
    """One line per run of plain training with all experts; the best on the watched half first."""
    lines = ["| control | watched | bits per byte with all experts | change |", "|---|---|---|---|"]
    for watched, name in sorted((runs[name].watched, name) for name in names if name in runs):
        bits = ratio(runs[name].after[FULL], runs[name].sizes_J).value
        change = _percent(paired_ratio(runs[name].after[FULL], runs[name].before[FULL]))
        lines.append(f"| `{name}` | {watched:.4f} | {bits:.4f} | {change} |")
    return "\n".join(lines)


def _pooled(runs: Sequence[Run], policy: str) -> np.ndarray:
    """The mean over seeds of each document's bits."""
    return np.mean([run.after[policy] for run in runs], axis=0)


class Comparison(NamedTuple):
    """Runs that differ only in seed, and their controls: plain training on as many tokens; measured at one k."""

    policy: str
    tuned: Sequence[Run]
    control: Sequence[Run]


def against_control(comparisons: Mapping[str, Comparison], label: str) -> tuple[str, dict[str, Estimate]]:
    """(control - tuned) / (control - full), full being the better of control and original with all experts.

    Args:
        comparisons: by label; those that have not run yet are left out.
        label: what the labels are, for the header of their column.

    Returns:
        One line per comparison, of means over seeds; and the estimates.
    """
    lines = [
        f"| {label} | original | control | tuned | full | recovered | of each seed |\n|---|---|---|---|---|---|---|"
    ]
    found = {}
    for name, (policy, runs, controls) in comparisons.items():
        if not runs or not controls:
            continue
        original = runs[0].before[FULL]
        full = min(original, _pooled(controls, FULL), key=np.sum)
        found[name] = recovered(_pooled(controls, policy), _pooled(runs, policy), full)
        each = [
            recovered(one.after[policy], run.after[policy], min(original, one.after[FULL], key=np.sum)).value
            for run, one in zip(runs, controls)
        ]
        bits = (runs[0].before[policy], _pooled(controls, policy), _pooled(runs, policy), full)
        cells = [_bits(ratio(one, runs[0].sizes_J)) for one in bits]
        shares = [_percent(found[name], signed=False), ", ".join(f"{share:.0%}" for share in each)]
        lines.append(f"| {name} | {' | '.join([*cells, *shares])} |")
    return "\n".join(lines), found


def elastic(one: Run, name: str, specialists: Mapping[str, Run]) -> tuple[str, dict[str, float]]:
    """How much one checkpoint recovers at every k, over what the specialist for that k recovers with as many tokens.

    Returns:
        One line per k, and the ratios of the loss that the two recover.
    """
    lines, found = [f"| k | original | `{name}` | specialist | over specialist |\n|---|---|---|---|---|"], {}
    for policy, specialist in {FULL: None, **specialists}.items():
        bits = [one.before[policy], one.after[policy]] + ([] if specialist is None else [specialist.after[policy]])
        cells = [_bits(ratio(part, one.sizes_J)) for part in bits]
        if specialist is None:
            cells += ["", _percent(paired_ratio(one.after[policy], one.before[policy])) + " more bits"]
        else:
            won = [(one.before[policy] - run.after[policy]).sum() for run in (one, specialist)]
            found[policy] = float(won[0] / won[1])
            cells.append(f"{found[policy]:.2f}")
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    return "\n".join(lines), found
