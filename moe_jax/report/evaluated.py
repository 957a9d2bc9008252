"""What each policy costs in quality: the measurements of one model, as figures and as a table."""

from collections.abc import Sequence

import numpy as np

from moe_jax.evaluation.intervals import paired_difference, paired_ratio, ratio
from moe_jax.report.figures import Row, csv_text, documents_csv, figure, load_figures, overflow_figure, policy_table
from moe_jax.study.compare import Measured, Task


def rows(task: Task, measured: Measured) -> list[Row]:
    """The rows of result.json: the figures of each policy, with each set of weights if there are several.

    From the second row on with differences from the first, paired by document. `bits_per_byte_increase` is a fraction
    of the first row's bits per byte; the others have the unit of their figure. What nothing was asked for has no
    figure.
    """
    bytes_J = task.held_out.bytes_J
    count = len(bytes_J)
    asked = np.array([question.document for question in task.questions], int)
    headed = np.array([header.document for header in task.headers], int)
    asked_J, headed_J = np.bincount(asked, minlength=count), np.bincount(headed, minlength=count)

    def rates(policy: int) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        """Name, unit, part and whole by document of each rate that was asked for."""
        greedy, sampled = (np.bincount(headed, parses, count) for parses in measured.parses[policy])
        asked_for = [
            ("choice_accuracy", "1", np.bincount(asked, measured.right[policy], count), asked_J),
            ("completion_parse_rate", "1", greedy, headed_J),
            ("completion_parse_rate_sampled", "1", sampled, headed_J),
        ]
        return [rate for rate in asked_for if rate[-1].any()]

    rows = []
    first = measured.likelihoods[0]
    for number, (measured_name, scored) in enumerate(zip(measured.names, measured.likelihoods, strict=True)):
        figures = {
            "bits_per_byte": figure(ratio(scored.bits_J, bytes_J), "bit/byte"),
            "kl_to_full": figure(ratio(scored.kl_J, scored.tokens_J), "nat/token"),
            **load_figures(scored.load_LE),
            **overflow_figure(scored.overflow if task.drops else None),
        }
        figures |= {name: figure(ratio(part, whole), unit) for name, unit, part, whole in rates(number)}
        if number:
            figures["bits_per_byte_increase"] = figure(paired_ratio(scored.bits_J, first.bits_J), "1")
            for (name, unit, part, whole), (_, _, reference, _) in zip(rates(number), rates(0)):
                figures[f"{name}_difference"] = figure(paired_difference(part, reference, whole), unit)
        rows.append({"policy": measured_name, "figures": figures})
    return rows


def table(rows: Sequence[Row]) -> str:
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
    columns = {
        head: (name, form) for head, (name, form) in columns.items() if any(name in row["figures"] for row in rows)
    }
    return policy_table(rows, columns)


def details(task: Task, measured: Measured) -> dict[str, str]:
    """`documents.csv`, each document's bits under each policy, and `expert_load.csv`, each expert's slots."""
    specs = measured.names
    loads_PLE = [scored.load_LE for scored in measured.likelihoods]
    expert_lines = [
        [spec, layer, *load_E]
        for spec, load_LE in zip(specs, loads_PLE)
        for layer, load_E in enumerate(load_LE.tolist())
    ]
    return {
        "documents.csv": documents_csv(
            task.held_out.documents, zip(specs, [scored.bits_J for scored in measured.likelihoods])
        ),
        "expert_load.csv": csv_text(["policy", "moe_layer", *range(loads_PLE[0].shape[1])], expert_lines),
    }
