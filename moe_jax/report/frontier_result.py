"""A frontier as figures and rows of result.json."""

from moe_jax.report.figures import figure
from moe_jax.study.frontier import Frontier, choices


def figures(frontier: Frontier) -> dict[str, dict]:
    """The gains of the recommended policies and of the best uniform k."""
    gains = {}
    for choice in choices(frontier):
        where = f"at_{choice.concurrency}_for_{1e3 * choice.limit:.0f}_per_mille"
        for name, point in (("best", choice.best), ("uniform", choice.uniform)):
            key = f"{name}_gain_{where}"
            gain, increase = point.speed.gain, point.quality.increase
            gains[key] = {"value": gain.value, "unit": "1", "quartiles": gain.ci95, "policy": point.policy}
            gains[key] |= {"bits_per_byte_increase": increase.value, "bits_per_byte_increase_ci95": increase.ci95}
        over = choice.over_uniform
        gains[f"best_over_uniform_{where}"] = {"value": over.value, "unit": "1", "quartiles": over.ci95}
    return gains


def rows(frontier: Frontier) -> list[dict]:
    """One row per point, a policy at a concurrency."""
    rows = []
    for point in frontier.points:
        quality, speed = point.quality, point.speed
        figures = {
            "bits_per_byte": figure(quality.bits_per_byte, "bit/byte"),
            "bits_per_byte_increase": figure(quality.increase, "1"),
            "experts_per_token": {"value": quality.experts_per_token, "unit": "experts"},
            "distinct_experts_per_layer_step": {"value": quality.distinct_experts, "unit": "experts"},
            "decode_tokens_per_s": {"value": speed.tokens_per_s, "unit": "tokens/s"},
            "throughput_gain": {"value": speed.gain.value, "unit": "1", "quartiles": speed.gain.ci95},
            "bytes": {"value": speed.bytes, "unit": "bytes"},
            "weights_bytes": {"value": point.weights_bytes, "unit": "bytes"},
        }
        if point.rival is not None:
            figures["bits_per_byte_over_rival"] = figure(point.rival.difference, "1")
        rival = None if point.rival is None else point.rival.policy
        rows.append({"policy": point.policy, "concurrency": point.concurrency, "rival": rival, "figures": figures})
    return rows
