"""Plots, as PNG."""

import io
import json
import math
import pathlib

from matplotlib.figure import Figure


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
