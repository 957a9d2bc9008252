"""Predictions under load as figures and rows of result.json, and as tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from moe_jax.report.figures import Row, markdown
from moe_jax.report.frontier_table import signed
from moe_jax.study.prediction import Fit, Gain, Latency, Predicted


def figures(predicted: Predicted) -> dict[str, dict[str, Any]]:
    """The constants, the errors of every column, and the least gain of each policy."""
    reached, constants = predicted.reached, predicted.constants
    found = {
        "bandwidth": {"value": reached.bytes_per_s, "unit": "bytes/s"},
        "rate": {"value": reached.flops_per_s, "unit": "flop/s"},
        "efficiency": {"value": constants.efficiency, "unit": "1"},
        "step_s": {"value": constants.step_s, "unit": "s"},
        "row_s": {"value": constants.row_s, "unit": "s"},
        **{name: {"value": value, "unit": "tokens"} for name, value in predicted.saturating.items()},
        **{name: {"value": value, "unit": "elements"} for name, value in predicted.exchanged.items()},
    }
    for fit in predicted.fits:
        for name, (median, largest) in fit.errors.items():
            key = f"{fit.table}_{name}"
            found[f"{key}_median_error"] = {"value": median, "unit": "1", "fitted": name == fit.column}
            found[f"{key}_largest_error"] = {"value": largest, "unit": "1"}
            found[f"{key}_gain_median_error"] = {"value": fit.gain_errors[name], "unit": "1"}
    return found


def rows(predicted: Predicted) -> list[Row]:
    """A row per policy and concurrency of a closed loop, then one per policy and load of open arrivals."""
    return [*map(_gain_row, predicted.gains), *map(_latency_row, predicted.latencies)]


def _gain_row(gain: Gain) -> Row:
    return {
        "policy": gain.policy,
        "concurrency": gain.concurrency,
        "figures": {
            "tokens_per_s": {"value": gain.tokens_per_s, "unit": "tokens/s"},
            "throughput_gain": {"value": gain.gain, "unit": "1"},
            "experts_per_token": {"value": gain.experts_per_token, "unit": "experts"},
            "distinct_experts_per_layer_step": {"value": gain.distinct_experts, "unit": "experts"},
        },
    }


def _latency_row(latency: Latency) -> Row:
    seconds = {
        f"{name}_p{percent}": {"value": value, "unit": "s"}
        for name, values in latency.seconds.items()
        for percent, value in values.items()
    }
    rate = {"requests_per_s": {"value": latency.requests_per_s, "unit": "requests/s"}}
    place = {"policy": latency.policy, "load": latency.load, "variation": latency.variation}
    return {**place, "figures": {**rate, **seconds}}


def table(predicted: Predicted) -> str:
    """For people: constants and errors, gains by concurrency, and latencies."""
    reached, constants = predicted.reached, predicted.constants
    parts = [
        f"{predicted.subject}\nFitted: {1e-12 * reached.bytes_per_s:.2f} TB/s and {1e-12 * reached.flops_per_s:.0f} "
        f"TFLOP/s ({constants.efficiency:.0%} of the peak), {1e3 * constants.step_s:.2f} ms per step, "
        f"{1e3 * constants.row_s:.3f} ms per row and step.",
        _sizes(predicted),
        *map(_errors_table, predicted.fits),
        f"Predicted gain in throughput; {predicted.routing}:",
        _gains_table(predicted.gains),
        "Seconds from arrival to the first token / to the last, of 99% of requests, under open arrivals:",
        _latency_table(predicted.latencies),
    ]
    return "\n\n".join(parts)


def _sizes(predicted: Predicted) -> str:
    dense, experts = predicted.saturating.values()
    by_expert, by_tensor = predicted.exchanged.values()
    return (
        f"At the peak, a feed-forward as wide as k experts is bound by arithmetic from {dense:.0f} tokens on, a "
        f"layer of experts from {experts:.0f} on. For each token and layer, devices exchange at most {by_expert} "
        f"numbers if split by experts, at least {by_tensor} if split by tensors."
    )


def _errors_table(fit: Fit) -> str:
    def line(name: str) -> list[str]:
        errors = [*fit.errors[name], fit.gain_errors[name]]
        fitted = " (fitted)" if name == fit.column else ""
        return [
            name + fitted,
            *(f"{100 * one:+.1f}" for one in fit.relative[name]),
            *(f"{100 * one:.1f}" for one in errors),
        ]

    head = ["", *map(str, fit.concurrency), "median", "largest", "median of the gain"]
    return f"{fit.table}, predicted over measured throughput, %:\n\n" + markdown(head, map(line, fit.errors))


def _gains_table(gains: Sequence[Gain]) -> str:
    concurrencies = sorted({gain.concurrency for gain in gains})
    found = {(gain.policy, gain.concurrency): gain for gain in gains}

    def cell(gain: Gain) -> str:
        return f"{signed(gain.gain)} ({gain.distinct_experts:.0f})"

    lines = (
        [f"`{policy}`", *(cell(found[policy, clients]) for clients in concurrencies)] for policy in _policies(gains)
    )
    return markdown(["gain (distinct experts of a layer)", *map(str, concurrencies)], lines)


def _latency_table(latencies: Sequence[Latency]) -> str:
    found = {(one.policy, one.load, one.variation): one for one in latencies}
    places = sorted({(one.variation, one.load, one.requests_per_s) for one in latencies})

    def cell(latency: Latency) -> str:
        return " / ".join(f"{latency.seconds[name][99]:.3g}" for name in ("first_token", "whole_request"))

    head = ["variation, load, requests/s", *(f"{one:g}, {load:.0%}, {rate:.2f}" for one, load, rate in places)]
    lines = (
        [f"`{policy}`", *(cell(found[policy, load, variation]) for variation, load, _ in places)]
        for policy in _policies(latencies)
    )
    return markdown(head, lines)


def _policies(points: Iterable[Gain | Latency]) -> list[str]:
    return list(dict.fromkeys(point.policy for point in points))
