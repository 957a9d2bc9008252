"""Plots, as PNG."""

import io
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator


def draw_training_curve(metrics: pathlib.Path) -> bytes:
    """Draws training loss (bits per token) and held-out bits per byte over steps, from `metrics.jsonl`.

    The training loss is that of the next token and, with a teacher, the divergence from it.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    held_out = [(line["step"], line["bits_per_byte"]) for line in lines if "bits_per_byte" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    for name, label, color in (("loss", "next token", "0.6"), ("divergence", "divergence", "tab:orange")):
        if trained := [(line["step"], line[name] / math.log(2)) for line in lines if name in line]:
            left.plot(*zip(*trained), linewidth=0.8, color=color, label=label)
    left.legend(loc="upper right", frameon=False)
    left.set(xlabel="step", ylabel="training, bits per token", yscale="log")
    right = left.twinx()
    right.plot(*zip(*held_out), marker=".", color="tab:blue")
    right.set_ylabel("held-out bits per byte (blue)")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def draw_throughput(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws tokens per second over the load, one curve for each policy, as the figure of arXiv 2505.03531 does.

    Args:
        lines: `policy`, `load` (rows of a decode step), `tokens_per_s`, and `device` for the title. Policies of one k
            have solid curves, others dashed ones, in the order of their first lines.
    """
    curves = {}
    for line in lines:
        curves.setdefault(line["policy"], []).append((line["load"], line["tokens_per_s"]))
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for policy, points in curves.items():
        fixed = re.fullmatch(r"topk:\d+", policy)
        label = policy.replace("topk:", "k = ") if fixed else policy
        axes.plot(*zip(*sorted(points)), "o-" if fixed else "s--", markersize=4, linewidth=1.3, label=label)
    loads = sorted({line["load"] for line in lines})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(loads, loads)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.set(xlabel="load: rows decoded together", ylabel="throughput, tokens/s")
    axes.set_title("; ".join(dict.fromkeys(line["device"] for line in lines)), fontsize=9)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
