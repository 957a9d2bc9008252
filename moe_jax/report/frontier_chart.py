"""Draws a frontier with matplotlib: throughput against quality, one panel per concurrency; the lower right is better.

The policies of the front carry numbers, in the order of their throughput, and a list beside the panel names them.
"""

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moe_jax.report.frontier_table import gain_text, increase_text, signed
from moe_jax.study.frontier import LIMITS, Frontier, Point, choices

CEILING = 0.1  # worse policies would squeeze the others together: the page lists them below the chart
_LINEAR = 0.005  # increases are spread evenly up to here, and by their logarithm above
_TICKS = (0, 0.005, 0.01, 0.02, 0.05, 0.1)
_INK, _SOFT, _FAINT, _LIMIT, _RING = "#1c2024", "#565d66", "#e6e8ea", "#c2372e", "#0a5ea8"
_FONT = {"font.family": "sans-serif", "font.size": 11}
_PLAIN = {"parse_math": False, "in_layout": False}  # for text that is not ours: dollar signs are not formulas
_INCHES = (4.7, 4.0)  # of a panel; on a phone a point is then about a pixel
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


class Look(NamedTuple):
    """The marks of the policies that decide on experts in the same way."""

    marker: str  # matplotlib's
    size: float  # of a mark that holds a number, in points
    symbol: str  # the same as a character
    color: str
    kinds: tuple[str, ...]


LOOKS = {
    "one k": Look("o", 15, "●", "#4a525b", ("model", "topk", "renormalize")),
    "by layer": Look("s", 14, "■", "#0b62b0", ("schedule", "layers")),
    "by token": Look("p", 17, "⬟", "#b8480a", ("ratio", "median", "mass")),
    "fewer experts in the model": Look("^", 16, "▲", "#7a3fb0", ("pruned",)),
    "by all rows of a step": Look("D", 12.5, "◆", "#00796b", ("opportunistic", "budget", "reroute", "capacity")),
}
_OTHER = Look("X", 15, "✖", "#6b7280", ())  # a kind that this file does not know


def look(policy: str) -> Look:
    """The look of a spec: that of its last part, skipping `topk` and `renormalize` if there are other parts."""
    kinds = [part.partition(":")[0] for part in policy.split("+")]
    telling = [kind for kind in kinds if kind not in ("topk", "renormalize")] or kinds
    return next((look for look in LOOKS.values() if telling[-1] in look.kinds), _OTHER)


def front(points: Sequence[Point]) -> list[Point]:
    """The points up to `CEILING` that no other beats in both quality and speed, slowest first; of equals, the first."""
    unbeaten, least = [], math.nextafter(CEILING, 1)
    for point in sorted(points, key=lambda point: (-point.speed.gain.value, point.quality.increase.value)):
        if point.quality.increase.value < least:
            unbeaten.append(point)
            least = point.quality.increase.value
    return unbeaten[::-1]


def svg(points: Sequence[Point], recommended: Collection[str], numbers: Mapping[str, int]) -> str:
    """Draws the points of one concurrency that are at most `CEILING` worse, as SVG for a page.

    Args:
        points: all points of one concurrency.
        recommended: the policies to ring.
        numbers: policy -> number; what belongs to a policy has the class `p` with its number.
    """
    with matplotlib.rc_context(_FONT | {"svg.fonttype": "none", "svg.hashsalt": "frontier"}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        _panel(figure.subplots(), points, recommended)
        image = io.StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata=_NO_METADATA)
    text = re.sub(r'<\?xml.*?(?=<svg)| xmlns\S*="[^"]*"| id="[\w.]+_\d+"|<!--.*?-->', "", image.getvalue(), flags=re.S)
    name = f"Quality against throughput at concurrency {points[0].concurrency}"
    text = text.replace("<svg", f'<svg role="group" aria-label="{name}"', 1)
    for place, point in enumerate(points):
        number = f"p{numbers[point.policy]}"
        words = f"{point.policy}: throughput {gain_text(point)}; bits per byte {increase_text(point)}"
        text = text.replace(f'<g id="mark-{place}">', f'<g class="mark {number}">')
        text = text.replace(f'<g id="area-{place}">', f'<g class="area {number}"><title>{escape(words)}</title>')
    return text


def png(frontier: Frontier) -> bytes:
    """Draws all panels, each above the list of its front, as PNG."""
    chosen, panels = choices(frontier), {}
    for point in sorted(frontier.points, key=lambda point: point.concurrency):
        panels.setdefault(point.concurrency, []).append(point)
    columns, list_inches = min(3, len(panels)), 0.18 * max(len(front(points)) for points in panels.values())
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=(_INCHES[0] * columns, (_INCHES[1] + 0.5 + list_inches) * rows), layout="constrained")
        axes_PC = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[_INCHES[1], list_inches] * rows)
        for axes in axes_PC.flat:
            axes.set_axis_off()
        for place, (concurrency, points) in enumerate(panels.items()):
            axes, below = axes_PC[2 * (place // columns) :, place % columns][:2]
            recommended = {choice.best.policy for choice in chosen if choice.concurrency == concurrency}
            axes.set_axis_on()
            axes.set_title(f"Concurrency {concurrency}", loc="left", pad=22, fontweight="bold")
            _panel(axes, points, recommended)
            below.text(0, 1, _listed(points, recommended), va="top", family="monospace", fontsize=8.5, **_PLAIN)
        marks = [
            Line2D([], [], linestyle="none", marker=look.marker, color=look.color, label=words)
            for words, look in LOOKS.items()
        ]
        figure.legend(handles=marks, loc="outside upper left", ncols=len(marks), frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=75, pil_kwargs={"optimize": True})
    return image.getvalue()


def _listed(points: Sequence[Point], recommended: Collection[str]) -> str:
    """The front in lines: number, gain, increase, `*` if recommended, policy."""
    return "\n".join(
        f"{number:2} {signed(point.speed.gain.value, 0):>5} {signed(point.quality.increase.value, 2):>7} "
        f"{'*' if point.policy in recommended else ' '}{point.policy}"
        for number, point in enumerate(front(points), 1)
    )


def _panel(axes: Axes, points: Sequence[Point], recommended: Collection[str]) -> None:
    best = front(points)
    lows = [low for point in points for low in (0, point.quality.increase.ci95[0])]
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=0.7)
    axes.set_yticks(_TICKS, [f"{tick:.1%}".replace(".0", "") for tick in _TICKS])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(lows) - _LINEAR / 6, CEILING * 1.1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda gain, _: signed(gain, 0)))
    axes.margins(x=0.06)
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_SOFT)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("throughput over the full model", loc="right", color=_SOFT)
    axes.text(0, 1.02, "more bits per byte than the full model", transform=axes.transAxes, color=_SOFT)
    for limit in LIMITS:
        axes.axhline(limit, color=_LIMIT, linewidth=0.8)
    drawn = [point for point in points if point.quality.increase.value <= CEILING]
    uniform = sorted((point for point in drawn if point.uniform), key=lambda point: -point.quality.experts_per_token)
    axes.plot(*zip(*map(_place, uniform)), "--", color=_SOFT, linewidth=1, gid="uniform")
    axes.step(*zip(*map(_place, best)), where="pre", color=_INK, linewidth=1.3, gid="front")
    for point in drawn:
        number = best.index(point) + 1 if point in best else None
        _mark(axes, point, number, point.policy in recommended, points.index(point))


def _place(point: Point) -> tuple[float, float]:
    return point.speed.gain.value, point.quality.increase.value


def _mark(axes: Axes, point: Point, number: int | None, ringed: bool, place: int) -> None:
    """Draws a point with its intervals: with its number if it is on the front, else small and pale."""
    (x, y), (marker, full_size, _, color, _) = _place(point), look(point.policy)
    mark = {"gid": f"mark-{place}", "zorder": 3 if number is None else 4}
    (left, right), (low, high) = point.speed.gain.ci95, point.quality.increase.ci95
    axes.plot([left, right], [y, y], [x, x], [low, high], color=color, linewidth=0.8, alpha=0.45, gid=mark["gid"])
    size, alpha = (5, 0.55) if number is None else (full_size, 1)
    axes.plot(x, y, marker, color=color, markersize=size, alpha=alpha, markeredgecolor="white", **mark)
    if ringed:
        ring = {"markerfacecolor": "none", "markeredgecolor": _RING, "markeredgewidth": 1.8}
        axes.plot(x, y, "o", markersize=22, **ring, **mark)
    if number is not None:
        centre = {"ha": "center", "va": "center_baseline", "fontsize": 10.5, "fontweight": "bold"}
        axes.text(x, y, f"{number}", color="white", **centre, **mark)
    elif point.uniform:
        left_of = {"xytext": (-6, 3), "textcoords": "offset points", "ha": "right"} | _PLAIN
        axes.annotate(point.policy.replace("topk:", "k="), (x, y), fontsize=10.5, **left_of, **mark)
    axes.plot(x, y, "o", markersize=18, alpha=0, gid=f"area-{place}", zorder=5)  # to point at
