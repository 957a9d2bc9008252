"""Pruned models beside the whole one: figures, and a table."""

from collections.abc import Sequence

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.config.pruning import RANDOM
from moe_jax.evaluation.intervals import paired_ratio, ratio
from moe_jax.model import parameters
from moe_jax.report.figures import Row, cell, figure, markdown
from moe_jax.study.prune import Pruned, PruningText


def rows(text: PruningText, architecture: Architecture, full_J: np.ndarray, measured: Sequence[Pruned]) -> list[Row]:
    """The rows of result.json: the whole model, each smaller one, and the mean of the random ones of each size.

    `bits_per_byte_increase` is relative to the whole model and `bits_per_byte_over_random` to the mean of the random
    models of the same size, both paired by document. The row of a mean has the `range` of its models.
    """
    bytes_J = text.held_out.bytes_J
    tokens = {"value": int(text.calibration.valid_JT.sum()), "unit": "tokens"}

    def row(name: str, bits_J: np.ndarray, shape: Architecture, random_J: np.ndarray | None) -> Row:
        figures = {
            "bits_per_byte": figure(ratio(bits_J, bytes_J), "bit/byte"),
            "bits_per_byte_increase": figure(paired_ratio(bits_J, full_J), "1"),
            "parameters": {"value": parameters.count(shape), "unit": "1"},
        }
        if random_J is not None:
            figures["bits_per_byte_over_random"] = figure(paired_ratio(bits_J, random_J), "1")
        return {"policy": name, "figures": figures, "experts_of_layers": list(shape.num_experts_L)}

    found = [row("model", full_J, architecture, None)]
    found[0]["figures"]["calibration"] = tokens
    for keep in dict.fromkeys(one.choice.keep for one in measured):
        same_size = [one for one in measured if one.choice.keep == keep]
        draws = [one for one in same_size if one.choice.method == RANDOM]
        random_J = np.mean([one.bits_J for one in draws], axis=0) if draws else None
        if draws:
            mean = row(draws[0].choice.group, random_J, draws[0].architecture, None)
            each = [one.bits_J.sum() / bytes_J.sum() for one in draws]
            mean["figures"]["bits_per_byte"]["range"] = [min(each), max(each)]
            found.append(mean)
        found += [row(one.choice.name, one.bits_J, one.architecture, random_J) for one in same_size]
    return found


def table(rows: Sequence[Row]) -> str:
    """One line per model, in Markdown; intervals are 95%."""
    columns = {
        "bits per byte": ("bits_per_byte", "{:.3f}"),
        "over the whole model, paired": ("bits_per_byte_increase", "{:+.1%}"),
        "over the mean of random ones, paired": ("bits_per_byte_over_random", "{:+.1%}"),
    }

    def line(row: Row) -> list[str]:
        experts, figures = row["experts_of_layers"], row["figures"]
        size = f"{experts[0]}" if len({*experts}) == 1 else ", ".join(map(str, experts))
        cells = [cell(figures.get(name), form) for name, form in columns.values()]
        if "range" in figures["bits_per_byte"]:
            cells[0] += " [{:.3f} to {:.3f}]".format(*figures["bits_per_byte"]["range"])
        return [f"`{row['policy']}`", size, f"{figures['parameters']['value'] / 1e6:.1f} M", *cells]

    return markdown(["model", "experts", "parameters", *columns], map(line, rows))
