"""Plots, as PNG."""

import io
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_training_curve(metrics: pathlib.Path) -> bytes:
    """Training loss in bits per token beside held-out bits per byte, over steps, from `metrics.jsonl`."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [(line["step"], line["loss"] / math.log(2)) for line in lines if "loss" in line]
    held_out = [(line["step"], line["bits_per_byte"]) for line in lines if "bits_per_byte" in line]
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    left.plot(*zip(*trained), linewidth=0.8, color="0.6")
    left.set(xlabel="step", ylabel="training loss, bits per token (grey)")
    right = left.twinx()
    right.plot(*zip(*held_out), marker=".", color="tab:blue")
    right.set_ylabel("held-out bits per byte (blue)")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    return image.getvalue()
