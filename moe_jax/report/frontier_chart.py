"""One chart of a frontier, as inline SVG: throughput and quality of every policy at one load.

The x axis is the gain in throughput, the y axis the increase of bits per byte: the lower right is better. The page sets
the colours, by the class of each mark, which is its policy's kind.
"""

import math
from collections.abc import Collection, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from moe_jax.report.frontier_table import gain_text, increase_text
from moe_jax.study.frontier import LIMITS, Point

CEILING = 0.1  # worse policies would squeeze the others together: they are listed below the chart
SHAPES = {  # of marks, by what decides on the experts: one number, the layer, the token, or all rows of a step
    "model": "disc",
    "topk": "disc",
    "renormalize": "disc",
    "schedule": "square",
    "layers": "square",
    "ratio": "triangle",
    "median": "triangle",
    "mass": "triangle",
    "opportunistic": "diamond",
    "budget": "diamond",
    "reroute": "diamond",
    "capacity": "diamond",
}
OTHER = "other"  # a kind that this file does not know
_PATHS = {
    "disc": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5.2L5.2 4H-5.2z",
    "diamond": "M0-5.6L5.6 0L0 5.6L-5.6 0z",
    "cross": "M-4.5-2.5l2-2l2.5 2.5l2.5-2.5l2 2l-2.5 2.5l2.5 2.5l-2 2l-2.5-2.5l-2.5 2.5l-2-2l2.5-2.5z",
}
_WIDTH, _HEIGHT = 320, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 302, 22, 272
_LINEAR = 0.005  # increases are spread evenly up to about here, and by their logarithm above
_TICKS = (0, 0.005, 0.01, 0.02, 0.05, 0.1)
_LONGEST_LABEL = 22
_LETTER = 6.6  # width of a letter at 12 px; enough for the fonts that systems ship
_NEAR = 11  # between the centre of a mark and its label


class Bounds(NamedTuple):
    """The ranges of a chart's axes, as fractions over the full model."""

    gain: tuple[float, float]
    increase: tuple[float, float]

    def x(self, gain: float) -> float:
        """The x coordinate of a gain, in pixels."""
        low, high = self.gain
        return _LEFT + (min(max(gain, low), high) - low) / (high - low) * (_RIGHT - _LEFT)

    def y(self, increase: float) -> float:
        """The y coordinate of an increase, in pixels."""
        low, high = (math.asinh(end / _LINEAR) for end in self.increase)
        part = (math.asinh(increase / _LINEAR) - low) / (high - low)
        return _BOTTOM - min(max(part, 0), 1) * (_BOTTOM - _TOP)

    def at(self, point: Point) -> tuple[float, float]:
        """The coordinates of a point, in pixels."""
        return self.x(point.speed.gain.value), self.y(point.quality.increase.value)


def kind_of(policy: str) -> str:
    """The kind that colours a spec: its last part's, skipping `topk` and `renormalize` if there are other parts."""
    kinds = [part.partition(":")[0] for part in policy.split("+")]
    telling = [kind for kind in kinds if kind not in ("topk", "renormalize")] or kinds
    return telling[-1] if telling[-1] in SHAPES else OTHER


def mark(policy: str) -> str:
    """The mark of a policy, around the origin."""
    kind = kind_of(policy)
    return f'<path class="kind-{kind}" d="{_PATHS[SHAPES.get(kind, "cross")]}"/>'


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both quality and speed, slowest first; of equal points, the first."""
    found, least = [], math.inf
    for point in sorted(points, key=lambda point: (-point.speed.gain.value, point.quality.increase.value)):
        if point.quality.increase.value < least:
            found.append(point)
            least = point.quality.increase.value
    return found[::-1]


def chart(points: Sequence[Point], numbers: dict[str, int], recommended: Collection[str]) -> str:
    """Draws the points of one load that are at most `CEILING` worse.

    Args:
        points: of one load.
        numbers: policy -> number; marks and labels of a policy have the class `p` with its number.
        recommended: the policies to ring.
    """
    drawn = [point for point in points if point.quality.increase.value <= CEILING]
    best, bounds = front(drawn), _bounds(drawn)
    drawn.sort(key=lambda point: (point in best, point.policy in recommended))  # the last is drawn on top
    named = sorted(
        (point for point in drawn if point in best or point.policy in recommended or point.uniform),
        key=lambda point: (point.policy not in recommended, point not in best),
    )
    uniform, stairs = _uniform(drawn, bounds), _stairs(best, bounds)
    avoided = [box for corners in (uniform, stairs) for box in _along(corners)]
    parts = [
        _axes(bounds),
        _line("uniform", uniform),
        _line("front", stairs),
        *(_whiskers(point, bounds, numbers) for point in drawn),
        *(_marked(point, bounds, numbers, point in best, point.policy in recommended) for point in drawn),
        *_labels(named, [bounds.at(point) for point in drawn], avoided, bounds, numbers),
    ]
    title = f"Quality against throughput at concurrency {points[0].concurrency}" if points else ""
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="{title}">{"".join(parts)}</svg>'


def _bounds(points: Sequence[Point]) -> Bounds:
    gains = [0.0, 0.02, *(point.speed.gain.value for point in points)]
    lows = [0.0, *(point.quality.increase.ci95[0] for point in points)]
    span = max(gains) - min(gains)
    return Bounds((min(gains) - 0.06 * span, max(gains) + 0.06 * span), (min(lows) - _LINEAR / 3, CEILING))


def _axes(bounds: Bounds) -> str:
    parts = []
    for tick in _TICKS:
        y, limit = bounds.y(tick), ' class="limit"' if tick in LIMITS else ' class="grid"'
        parts.append(f'<line{limit} x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{y + 4:.1f}">{tick * 100:g}%</text>')
    for tick in _round_steps(*bounds.gain):
        x = bounds.x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{_BOTTOM + 15}">{tick:+.0%}</text>')
    parts.append('<text class="axis" x="0" y="11">↑ more bits per byte</text>')
    parts.append(f'<text class="axis end" x="{_RIGHT}" y="{_HEIGHT - 6}">throughput over the full model →</text>')
    return "".join(parts).replace(">+0%<", ">0%<").replace(">-", ">−")


def _round_steps(low: float, high: float) -> list[float]:
    """Three to seven round numbers from low to high."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.99)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _uniform(points: Sequence[Point], bounds: Bounds) -> list[tuple[float, float]]:
    """The corners of the line through uniform k."""
    uniform = [point for point in points if point.uniform]
    return [bounds.at(point) for point in sorted(uniform, key=lambda point: -point.quality.experts_per_token)]


def _stairs(best: Sequence[Point], bounds: Bounds) -> list[tuple[float, float]]:
    """The corners of the front, a staircase: between two of its policies, the worse one is the best available."""
    places = [bounds.at(point) for point in best]
    return places[:1] + [corner for (x, _), (u, v) in pairwise(places) for corner in ((x, v), (u, v))]


def _line(name: str, corners: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>'


def _whiskers(point: Point, bounds: Bounds, numbers: dict[str, int]) -> str:
    x, y = bounds.at(point)
    left, right = (bounds.x(end) for end in point.speed.gain.ci95)
    bottom, top = (bounds.y(end) for end in point.quality.increase.ci95)
    kind = f"whisker line-{kind_of(point.policy)} p{numbers[point.policy]}"
    return f'<path class="{kind}" d="M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {bottom:.1f}V{top:.1f}"/>'


def _marked(point: Point, bounds: Bounds, numbers: dict[str, int], on_front: bool, ringed: bool) -> str:
    x, y = bounds.at(point)
    tooltip = (
        f"{point.policy}: throughput {gain_text(point)}, {point.speed.tokens_per_s:,.0f} tokens/s; "
        f"bits per byte {increase_text(point)}"
    )
    ring = '<circle class="ring" r="8"/>' if ringed else ""
    dominated = "" if on_front else " dominated"
    return (
        f'<g class="mark{dominated} p{numbers[point.policy]}" transform="translate({x:.1f} {y:.1f})">'
        f"<title>{escape(tooltip)}</title>{ring}{mark(point.policy)}</g>"
    )


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        """Whether two boxes overlap."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def distance(self, x: float, y: float) -> float:
        """Distance from a place to the box."""
        return math.dist((x, y), self.nearest(x, y))

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place in the box that is nearest to the given one."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


def short(policy: str) -> str:
    """The label of a spec in a chart: `k=4` for uniform k, `+none` for `+renormalize:none`; long ones are cut."""
    kind, _, k = policy.partition(":")
    if kind == "topk" and k.isdigit():
        return f"k={k}"
    if policy == "model":
        return "full"
    label = policy.replace("+renormalize:", "+")
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _along(corners: Sequence[tuple[float, float]]) -> list[_Box]:
    """Small boxes along a line, which labels should not cover."""
    found = []
    for (x, y), (u, v) in pairwise(corners):
        steps = max(1, round(math.hypot(u - x, v - y) / 5))
        for part in (step / steps for step in range(steps + 1)):
            across, down = x + (u - x) * part, y + (v - y) * part
            found.append(_Box(across - 1, down - 1, across + 1, down + 1))
    return found


def _labels(
    named: Sequence[Point],
    marks: Sequence[tuple[float, float]],
    avoided: Sequence[_Box],
    bounds: Bounds,
    numbers: dict[str, int],
) -> list[str]:
    """Labels beside their marks, or a little away with a leader line; a label that fits nowhere is left out.

    Labels do not cover marks or other labels, and cover `avoided` boxes only where there is no other room. A label
    without a leader is nearer to its own mark than to any other.
    """
    taken, found = [_Box(x - 7, y - 6, x + 7, y + 6) for x, y in marks], []
    for point in named:
        text = short(point.policy)
        x, y = bounds.at(point)
        width = len(text) * _LETTER
        others = [place for place in marks if math.dist(place, (x, y)) > 2]
        placed = _place(x, y, width, [*taken, *avoided], others) or _place(x, y, width, taken, others)
        if placed is None:
            continue
        box, far = placed
        taken.append(box)
        leader = _line("leader", [(x, y), box.nearest(x, y)]) if far else ""
        middle = (box.left + box.right) / 2
        found.append(
            f'<g class="label p{numbers[point.policy]}">{leader}'
            f'<text class="middle" x="{middle:.1f}" y="{box.bottom - 3:.1f}">{escape(text)}</text></g>'
        )
    return found


def _place(
    x: float, y: float, width: float, taken: Sequence[_Box], others: Sequence[tuple[float, float]]
) -> tuple[_Box, bool] | None:
    """The nearest free box for a text of the given width around a mark, and whether it needs a leader line."""
    for distance in (_NEAR, 18, 30, 44):
        for across, down in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            length = distance if 0 in (across, down) else distance * 0.8
            left = x + across * length - (0 if across > 0 else width if across < 0 else width / 2)
            top = y + down * length - (0 if down > 0 else 14 if down < 0 else 7)
            box = _Box(left, top, left + width, top + 14)
            inside = box.left >= _LEFT and box.right <= _WIDTH and box.top >= _TOP - 8 and box.bottom <= _BOTTOM
            leader = [(x, y), box.nearest(x, y)]
            if not inside or any(box.meets(other) for other in taken):
                continue
            if distance == _NEAR and all(box.distance(x, y) < box.distance(*other) for other in others):
                return box, False
            if distance > _NEAR and not any(step.distance(*other) < 6 for step in _along(leader) for other in others):
                return box, True
    return None
