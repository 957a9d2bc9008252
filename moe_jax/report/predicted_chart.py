"""Draws predictions under load with matplotlib: beside what was measured, by policy, and under open arrivals."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from moe_jax.report.frontier_chart import look
from moe_jax.study.prediction import Fit, Gain, Latency, Predicted

_INCHES = (5.6, 4.2)  # of a panel
_DASHES = ("-", "--", ":", "-.")  # of policies that look alike


def png(predicted: Predicted) -> bytes:
    """One panel for each table, one for gains, and one for each variation of open arrivals."""
    variations = list(dict.fromkeys(one.variation for one in predicted.latencies))
    panels = len(predicted.fits) + 1 + len(variations)
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(2 * _INCHES[0], (panels + 1) // 2 * _INCHES[1]), layout="constrained")
        axes = iter(figure.subplots((panels + 1) // 2, 2, squeeze=False).flat)
        for fit in predicted.fits:
            _fit(next(axes), fit)
        _gains(next(axes), predicted.gains)
        for variation in variations:
            _latencies(next(axes), [one for one in predicted.latencies if one.variation == variation])
        for unused in axes:
            unused.set_axis_off()
        _legend(figure, [gain.policy for gain in predicted.gains])
        figure.suptitle(f"{predicted.subject}\n{predicted.routing}", fontsize=10, parse_math=False, wrap=True)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _fit(axes: Axes, fit: Fit) -> None:
    """Points: measured gain over the fitted column. Lines: predicted gain."""
    colors = matplotlib.colormaps["viridis"].resampled(len(fit.measured) + 1)
    for number, name in enumerate(one for one in fit.measured if one != fit.column):
        for values, style in ((fit.measured, "o"), (fit.predicted, "-")):
            pairs = zip(values[name], values[fit.column])
            gain = [rate / reference - 1 for rate, reference in pairs]
            label = name if style == "o" else None
            axes.plot(fit.concurrency, gain, style, color=colors(number), markersize=4, label=label)
    _clients(axes, fit.concurrency)
    axes.set_title(f"{fit.table}: points measured, lines predicted,\nboth over {fit.column}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _gains(axes: Axes, gains: Sequence[Gain]) -> None:
    clients = sorted({gain.concurrency for gain in gains})
    styles = _styles([gain.policy for gain in gains])
    for policy, style in styles.items():
        axes.plot(clients, [gain.gain for gain in gains if gain.policy == policy], **style)
    _clients(axes, clients)
    axes.set_title("Predicted gain in throughput over the full model", fontsize=10)


def _clients(axes: Axes, clients: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, map(str, clients), fontsize=8, rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="concurrency", ylabel="gain")
    axes.grid(alpha=0.25)


def _latencies(axes: Axes, latencies: Sequence[Latency]) -> None:
    loads = sorted({one.load for one in latencies})
    for policy, style in _styles([one.policy for one in latencies]).items():
        slow = [one.seconds["whole_request"][99] for one in latencies if one.policy == policy]
        axes.plot(loads, slow, **style)
    kind = "Poisson" if latencies[0].variation == 1 else f"bursty (variation {latencies[0].variation:g})"
    axes.set_title(f"Seconds per request, 99% of requests, {kind} arrivals", fontsize=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_xticks(loads, [f"{load:.0%}" for load in loads])
    axes.set(xlabel="arrivals over what the full model can serve", ylabel="seconds")
    axes.grid(alpha=0.25)


def _legend(figure: Figure, policies: Sequence[str]) -> None:
    """Names the policies of all panels, below them."""
    lines = [Line2D([], [], label=_short(policy), **style) for policy, style in _styles(policies).items()]
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(policy: str) -> str:
    """A spec that fits into the legend: one number for each of 58 layers does not."""
    return policy if len(policy) <= 40 else f"{policy[:30]}..."


def _styles(policies: Sequence[str]) -> dict[str, dict]:
    """A colour for each kind of policy, and another line for each policy of a kind."""
    seen: dict[str, int] = {}
    styles = {}
    for policy in dict.fromkeys(policies):
        kind = look(policy)
        number = seen[kind.color] = seen.get(kind.color, -1) + 1
        width = {"linewidth": 1.2 + 0.5 * (number // len(_DASHES))}
        marks = {"marker": kind.marker, "markersize": 3.5, "alpha": 1 - 0.12 * (number % 5)}
        styles[policy] = {"color": kind.color, "linestyle": _DASHES[number % len(_DASHES)], **marks, **width}
    return styles
