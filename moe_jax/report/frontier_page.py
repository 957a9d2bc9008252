"""A frontier as one self-contained HTML page: which policy to choose at each concurrency, and all measurements.

The page needs no network and runs no script. `frontier_page.html` is its template.
"""

import importlib.resources
from collections.abc import Iterable

import jinja2
from markupsafe import Markup

from moe_jax.evaluation.intervals import Estimate
from moe_jax.report.frontier_chart import CEILING, LOOKS, front, svg
from moe_jax.report.frontier_table import signed, with_interval
from moe_jax.study.frontier import LIMITS, Frontier, Point, choices


def page(frontier: Frontier) -> str:
    """The page, as HTML. At every concurrency at least one policy must be within each limit, as `model` always is."""
    numbers = {policy: number for number, policy in enumerate(dict.fromkeys(p.policy for p in frontier.points))}
    chosen, panels = choices(frontier), []
    for rows in sorted({point.concurrency for point in frontier.points}):
        points = [point for point in frontier.points if point.concurrency == rows]
        recommended = {choice.best.policy for choice in chosen if choice.concurrency == rows}
        panels.append(
            {
                "rows": rows,
                "points": points,
                "full": next((point for point in points if point.policy == "model"), None),
                "chart": Markup(svg(points, recommended, numbers)),
                "front": front(points),
                "recommended": recommended,
                "beyond": [point for point in points if point.quality.increase.value > CEILING],
            }
        )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "signed": signed,
        "with_interval": with_interval,
        "interval": _interval,
        "span": _span,
        "digits": _three_digits,
        "size": _size,
    }
    template = importlib.resources.files("moe_jax.report").joinpath("frontier_page.html").read_text()
    return environment.from_string(template).render(
        frontier=frontier,
        numbers=numbers,
        panels=panels,
        recommended={limit: [choice for choice in chosen if choice.limit == limit] for limit in LIMITS},
        kept=[_at_the_middle(frontier, policy) for policy in numbers],
        layers=max(len(point.quality.kept_L) for point in frontier.points),
        most=max(kept for point in frontier.points for kept in point.quality.kept_L),
        looks=LOOKS,
        ceiling=CEILING,
    )


def _at_the_middle(frontier: Frontier, policy: str) -> tuple[Point, bool]:
    """The policy's point at the middle concurrency, or at its first; and whether its kept experts vary with it."""
    concurrencies = sorted({point.concurrency for point in frontier.points})
    by_concurrency = {point.concurrency: point for point in frontier.points if point.policy == policy}
    varies = len({point.quality.kept_L for point in by_concurrency.values()}) > 1
    first = by_concurrency[min(by_concurrency)]
    return by_concurrency.get(concurrencies[len(concurrencies) // 2], first), varies


def _interval(estimate: Estimate, decimals: int = 1) -> str:
    """The interval of a change in percent; empty if it has no width."""
    low, high = (signed(end, decimals) for end in estimate.ci95)
    return "" if low == high else f"{low.removesuffix('%')} to {high}"


def _span(points: Iterable[Point]) -> str:
    """The smallest and the largest gain."""
    gains = [point.speed.gain.value for point in points]
    low, high = signed(min(gains), 0), signed(max(gains), 0)
    return low if low == high else f"{low} to {high}"


def _three_digits(value: float) -> str:
    """A number with three significant digits, or all digits before the point if there are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _size(size_bytes: float) -> str:
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if size_bytes >= s)
    return f"{_three_digits(size_bytes / (scale or 1))} {unit}"
