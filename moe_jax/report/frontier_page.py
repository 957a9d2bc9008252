"""A frontier as one self-contained HTML page: which policy to choose at each load, and all measurements.

The page needs no network and runs no script: CSS alone highlights the policy picked above the charts.
"""

import importlib.resources
from collections.abc import Iterable, Sequence
from html import escape

from moe_jax.evaluation.intervals import Estimate
from moe_jax.report.frontier_chart import CEILING, chart, mark
from moe_jax.report.frontier_table import signed, with_interval
from moe_jax.study.frontier import LIMITS, Choice, Frontier, Point, choices

_PICKED = """
.board:has(#pick{0}:checked) :is(.mark,.label,.whisker):not(.p{0}){{opacity:.13}}
.board:has(#pick{0}:checked) .whisker.p{0}{{opacity:1}}
.board:has(#pick{0}:checked) .told.p{0}{{display:block}}
.board:has(#pick{0}:checked) .told.whole{{display:none}}
body:has(#pick{0}:checked) :is(tr.p{0},tr.p{0}>th){{background:var(--picked)}}"""


def page(frontier: Frontier) -> str:
    """The page, as HTML. At every load at least one policy must be within each limit, as `model` always is."""
    numbers = {policy: number for number, policy in enumerate(dict.fromkeys(p.policy for p in frontier.points))}
    chosen = choices(frontier)
    style = importlib.resources.files("moe_jax.report").joinpath("frontier_page.css").read_text()
    style += "".join(_PICKED.format(number) for number in numbers.values())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Fewer experts: what each policy costs and buys</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Fewer experts: what each policy costs and buys</h1>
<dl class="subjects">
<div><dt>Quality of</dt><dd>{escape(frontier.quality_subject)}</dd></div>
<div><dt>Speed of</dt><dd>{escape(frontier.speed_subject)}</dd></div>
<div><dt>Machine</dt><dd>{escape(frontier.machine)}</dd></div>
</dl>
</header>
{_recommended(chosen, numbers)}
{_charts(frontier.points, chosen, numbers)}
{_heat_map(frontier.points, numbers)}
{_everything(frontier.points, numbers)}
{_reading(frontier)}
</main>
</body>
</html>
"""


def _loads(points: Iterable[Point]) -> list[int]:
    return sorted({point.concurrency for point in points})


def _two_lines(value: str, small: str, unit: str = "") -> str:
    """A value above its interval; the unit is shown where the screen is too narrow for a column head."""
    return f"<b>{value}</b><span class=unit>{unit}</span> <small>{small}</small>"


def _estimate(estimate: Estimate, decimals: int = 1, unit: str = "") -> str:
    """A change in percent above its interval, which is left out if it has no width."""
    low, high = (signed(end, decimals) for end in estimate.ci95)
    interval = "" if low == high else f"{low.removesuffix('%')} to {high}"
    return _two_lines(signed(estimate.value, decimals), interval, unit)


def _recommended(chosen: Sequence[Choice], numbers: dict[str, int]) -> str:
    most = max([0.01, *(choice.best.speed.gain.value for choice in chosen)])
    blocks = []
    for limit in LIMITS:
        within = [choice for choice in chosen if choice.limit == limit]
        best = _span([choice.best for choice in within])
        uniform = _span([choice.uniform for choice in within])
        rows = "\n".join(_recommended_row(choice, most, numbers) for choice in within)
        blocks.append(f"""<div>
<h3>At most {limit * 100:g}% worse</h3>
<p class="lead"><b>{best}</b> throughput, <span>best uniform k: {uniform}</span></p>
<table class="choices">
<thead><tr><th class="number">Concurrency</th><th>Recommended</th><th class="number">Throughput</th>
<th class="number">Bits per byte</th><th>Best uniform k</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>""")
    return f"""<section id="recommended">
<h2>Recommended at each load</h2>
<p>The fastest policy whose bits per byte rise by no more than the limit, at the upper end of the 95% interval. Changes
are relative to the full model at the same load. Bars: gain in throughput, of the recommendation above, of the best
uniform k below.</p>
{"".join(blocks)}
</section>"""


def _span(points: Sequence[Point]) -> str:
    """The smallest and the largest gain."""
    low, high = (signed(end(point.speed.gain.value for point in points), 0) for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _recommended_row(choice: Choice, most: float, numbers: dict[str, int]) -> str:
    best, uniform = choice.best, choice.uniform
    bars = "".join(
        f'<i class="{name}" style="width:{max(0, point.speed.gain.value) / most:.1%}"></i>'
        for name, point in (("ours", best), ("base", uniform))
    )
    beside = "the same"
    if uniform != best:
        ahead = f"<small>recommended over it: {with_interval(choice.over_uniform)}</small>"
        beside = f"<code>{escape(uniform.policy)}</code> {_estimate(uniform.speed.gain)} {ahead}"
    return (
        f'<tr class="p{numbers[best.policy]}">'
        f'<td class="number load"><span class=unit>concurrency</span> {choice.concurrency}</td>'
        f"<td class=policy>{_named(best.policy)}</td>"
        f"<td class=number>{_estimate(best.speed.gain, unit='throughput')}<span class=bars>{bars}</span></td>"
        f"<td class=number>{_estimate(best.quality.increase, 2, 'bits per byte')}</td>"
        f"<td class=beside><span class=unit>best uniform k</span> {beside}</td></tr>"
    )


def _glyph(policy: str) -> str:
    return f'<svg class="glyph" viewBox="-7 -7 14 14" aria-hidden="true">{mark(policy)}</svg>'


def _named(policy: str) -> str:
    code = escape(policy).replace("+", "<wbr>+")
    return f"<span class=named>{_glyph(policy)}<code>{code}</code></span>"


def _charts(points: Sequence[Point], chosen: Sequence[Choice], numbers: dict[str, int]) -> str:
    picks = "".join(
        f'<input type="radio" name="pick" id="pick{number}"><label for="pick{number}">{_named(policy)}</label>'
        for policy, number in numbers.items()
    )
    figures = []
    for load in _loads(points):
        recommended = {choice.best.policy for choice in chosen if choice.concurrency == load}
        figures.append(_figure([point for point in points if point.concurrency == load], numbers, recommended))
    shapes = (
        ("model", "one k"),
        ("layers", "by layer"),
        ("ratio", "by token"),
        ("budget", "by all rows of a step"),
    )
    key = "".join(f"<li>{_glyph(kind)} {words}</li>" for kind, words in shapes)
    return f"""<section id="frontier" class="board">
<h2>Quality against throughput</h2>
<p>Lower right is better. The dark staircase is the frontier: the policies that no other beats in both quality and
speed. The dashed line joins uniform k, rings mark recommended policies, and red lines the limits. Whiskers: 95%
intervals vertically, quartiles horizontally. The vertical scale is linear up to about 0.5% and logarithmic above; the
horizontal one differs between charts. Pick a policy to highlight it in every chart and table.</p>
<ul class="key">{key}</ul>
<div class="picks"><input type="radio" name="pick" id="pick" checked><label for="pick">all</label>{picks}</div>
<div class="charts">
{"".join(figures)}
</div>
</section>"""


def _figure(points: Sequence[Point], numbers: dict[str, int], recommended: set[str]) -> str:
    full = [f"full model: {p.speed.tokens_per_s:,.0f} tokens/s" for p in points if p.policy == "model"]
    beyond = [p for p in points if p.quality.increase.value > CEILING]
    named = ", ".join(f"{escape(p.policy)} ({signed(p.speed.gain.value)})" for p in beyond)
    below = f'<p class="beyond">More than {CEILING:.0%} worse: {named}</p>' if beyond else ""
    told = "".join(
        f'<span class="told p{numbers[p.policy]}">throughput <b>{signed(p.speed.gain.value)}</b>, bits per byte '
        f"<b>{signed(p.quality.increase.value, 2)}</b></span>"
        for p in points
    )
    return f"""<figure>
<figcaption><h3>Concurrency {points[0].concurrency}</h3>
<span class="told whole">{"".join(full)}</span>{told}</figcaption>
{chart(points, numbers, recommended)}{below}
</figure>
"""


def _heat_map(points: Sequence[Point], numbers: dict[str, int]) -> str:
    loads = _loads(points)
    middle = loads[len(loads) // 2]
    most = max(kept for point in points for kept in point.quality.kept_L)
    rows = []
    for policy, number in numbers.items():
        own = sorted((p for p in points if p.policy == policy), key=lambda p: (p.concurrency != middle, p.concurrency))
        varies = len({point.quality.kept_L for point in own}) > 1
        load = f" <small class=at>at {own[0].concurrency}</small>" if varies else ""
        rows.append(f'<tr class="p{number}"><th>{_named(policy)}{load}</th>{_heat_cells(own[0], most)}</tr>')
    layers = range(max(len(point.quality.kept_L) for point in points))
    head = "".join(f"<th>{layer}</th>" for layer in layers)
    return f"""<section id="layers">
<h2>Experts kept in each MoE layer</h2>
<p>Mean over tokens, from the quality run; a stronger colour means more, up to {most:.3g}. Where the number depends on
the load, the row names its concurrency.</p>
<div class="scroll" tabindex="0"><table class="heat" style="--columns:{len(layers)}">
<thead><tr><th>MoE layer</th>{head}<th>mean</th></tr></thead>
<tbody>
{"".join(rows)}
</tbody>
</table></div>
</section>"""


def _heat_cells(point: Point, most: float) -> str:
    cells = (f'<td style="--share:{kept / most:.1%}">{kept:.1f}</td>' for kept in point.quality.kept_L)
    return "".join(cells) + f"<td class=mean>{point.quality.experts_per_token:.2f}</td>"


def _everything(points: Sequence[Point], numbers: dict[str, int]) -> str:
    loads = _loads(points)
    blocks = []
    for load in loads:
        at_load = [point for point in points if point.concurrency == load]
        rows = "\n".join(_row(point, numbers) for point in at_load)
        opened = " open" if load == loads[len(loads) // 2] else ""
        blocks.append(f"""<details{opened}><summary>Concurrency {load}</summary>
<div class="scroll" tabindex="0"><table class="all">
<thead><tr><th>Policy</th><th>Throughput<small>tokens/s</small></th><th>Gain<small>quartiles</small></th>
<th>Bits per byte<small>95% interval</small></th><th>Increase<small>95% interval</small></th>
<th>Step<small>ms, quartiles</small></th><th>Bytes per step<small>at least</small></th>
<th>Kept<small>experts per token</small></th><th>Distinct, timed<small>experts per layer</small></th>
<th>Distinct, quality<small>experts per layer</small></th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div></details>""")
    return f"""<section id="everything">
<h2>Everything measured</h2>
<p>Distinct experts: the mean number that one MoE layer runs in one decode step at this concurrency, for the timed model
and for the model on which quality was measured.</p>
{"".join(blocks)}
</section>"""


def _row(point: Point, numbers: dict[str, int]) -> str:
    quality, speed = point.quality, point.speed
    first, median, third = map(_three_digits, speed.quartiles_ms)
    low, high = quality.bits_per_byte.ci95
    cells = (
        _three_digits(speed.tokens_per_s),
        _estimate(speed.gain),
        _two_lines(f"{quality.bits_per_byte.value:.4f}", f"{low:.4f} to {high:.4f}"),
        _estimate(quality.increase, 2),
        _two_lines(median, f"{first} to {third}"),
        _size(speed.bytes),
        f"{quality.experts_per_token:.2f}",
        f"{speed.distinct_experts:.1f}",
        f"{quality.distinct_experts:.1f}",
    )
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="p{numbers[point.policy]}"><th>{_named(point.policy)}</th>{columns}</tr>'


def _three_digits(value: float) -> str:
    """A number with three significant digits, or all digits before the point if there are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _size(size_bytes: float) -> str:
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if size_bytes >= s)
    return f"{_three_digits(size_bytes / (scale or 1))} {unit}"


def _reading(frontier: Frontier) -> str:
    return f"""<section id="reading">
<h2>How to read the numbers</h2>
<dl>
<dt>Concurrency</dt><dd>The rows of one decode step: requests that are decoded together.</dd>
<dt>Policy</dt><dd>Which of the experts that the router chose are kept; the value of <code>policy.spec</code>.
<code>model</code> is the full model; <code>topk:k</code> keeps the same k everywhere, which is uniform
k. <code>renormalize:none</code>, in charts <code>+none</code>, gives the kept experts the weights that they have in the
full model; without it, the model&#8217;s own rule applies.</dd>
<dt>Quality</dt><dd>Bits per byte of held-out text, of {escape(frontier.quality_subject)}. An increase is a fraction of
the full model&#8217;s bits per byte, paired by document; its interval holds 95% of resamplings of whole documents.</dd>
<dt>Throughput</dt><dd>Tokens per second of all rows together at the median step, of
{escape(frontier.speed_subject)}. A gain is over the full model in the same rounds. Intervals of gains and milliseconds
are quartiles over rounds, not 95% intervals.</dd>
<dt>Two models</dt><dd>If quality and speed come from different models, a recommendation assumes that the policy costs
the timed model as much quality as the other one: measure that before relying on it.</dd>
<dt>Bytes per step</dt><dd>The least that a step has to read and write; computed, not measured.</dd>
<dt>Machine</dt><dd>{escape(frontier.machine)}.</dd>
</dl>
</section>"""
