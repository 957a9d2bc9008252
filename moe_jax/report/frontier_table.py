"""A frontier as text: all points as CSV, and recommendations and gains as Markdown tables."""

from collections.abc import Sequence

from moe_jax.evaluation.intervals import Estimate
from moe_jax.report.figures import csv_text
from moe_jax.study.frontier import Choice, Frontier, Point, choices


def signed(fraction: float, decimals: int = 1) -> str:
    """A change in percent, with its sign and a typographic minus; no sign if it rounds to zero."""
    text = f"{fraction:+.{decimals}%}"
    return text[1:] if float(text[:-1]) == 0 else text.replace("-", "−")


def with_interval(estimate: Estimate, decimals: int = 1) -> str:
    """A change in percent with its interval, which is left out if it has no width."""
    low, high = (signed(end, decimals) for end in estimate.ci95)
    return signed(estimate.value, decimals) + (f" ({low} to {high})" if low != high else "")


def gain_text(point: Point) -> str:
    """The gain in throughput over the full model, with its quartiles."""
    return with_interval(point.speed.gain)


def increase_text(point: Point) -> str:
    """The increase of bits per byte over the full model, with its 95% interval."""
    return with_interval(point.quality.increase, 2)


def to_csv(frontier: Frontier) -> str:
    """A header and one line per point, with numbers in full precision.

    Fractions over the full model are plain numbers (0.01 is one percent). There is one `kept_layer_` column for each
    MoE layer of the deepest point.
    """
    layers = max(len(point.quality.kept_L) for point in frontier.points)
    head = [*_columns(frontier.points[0]), *(f"kept_layer_{layer}" for layer in range(layers))]
    return csv_text(head, ([*_columns(point).values(), *point.quality.kept_L] for point in frontier.points))


def _columns(point: Point) -> dict[str, str | float]:
    quality, speed = point.quality, point.speed
    return {
        "policy": point.policy,
        "concurrency": point.concurrency,
        **_estimate("bits_per_byte", quality.bits_per_byte),
        **_estimate("increase", quality.increase),
        "rival": point.rival.policy if point.rival else "",
        **_estimate("over_rival", point.rival.difference if point.rival else None),
        "experts_per_token": quality.experts_per_token,
        "distinct_experts_quality": quality.distinct_experts,
        "tokens_per_s": speed.tokens_per_s,
        **dict(zip(("ms_first_quartile", "ms_median", "ms_third_quartile"), speed.quartiles_ms)),
        **_estimate("gain", speed.gain),
        "bytes": speed.bytes,
        "weights_bytes": point.weights_bytes,
        "distinct_experts_timed": speed.distinct_experts,
    }


def _estimate(name: str, estimate: Estimate | None) -> dict[str, float | str]:
    value, (low, high) = estimate or ("", ("", ""))
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def table(frontier: Frontier) -> str:
    """In Markdown: the recommendation and the best uniform k, then each policy's gain, at each concurrency."""
    return f"{_choices_table(choices(frontier))}\n\n{_gains_table(frontier.points)}"


def _choices_table(chosen: Sequence[Choice]) -> str:
    lines = ["| concurrency | limit | policy | gain | more bits per byte | uniform | gain | over uniform |"]
    lines.append("|--:" * 8 + "|")
    for choice in chosen:
        lines.append(
            f"| {choice.concurrency} | {choice.limit:.1%} | `{choice.best.policy}` | {gain_text(choice.best)} | "
            f"{increase_text(choice.best)} | `{choice.uniform.policy}` | {gain_text(choice.uniform)} | "
            f"{with_interval(choice.over_uniform)} |"
        )
    return "\n".join(lines)


def _gains_table(points: Sequence[Point]) -> str:
    """The gain in throughput, one row per policy and one column per concurrency; with pruned models, memory too."""
    concurrencies = sorted({point.concurrency for point in points})
    gains = {(point.policy, point.concurrency): signed(point.speed.gain.value) for point in points}
    sizes = {point.policy: point.weights_bytes for point in points}
    costs = {point.policy: increase_text(point) for point in reversed(points)}  # at the lowest concurrency
    more = ["weights", "more bits per byte"] if len({*sizes.values()}) > 1 else []
    heads = ["gain at concurrency", *more, *map(str, concurrencies)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for policy, size_bytes in sizes.items():
        cells = [f"{size_bytes / 1e6:,.0f} MB", costs[policy]] if more else []
        cells += [gains.get((policy, concurrency), "") for concurrency in concurrencies]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
