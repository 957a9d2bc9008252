"""A made-up frontier that behaves like a real one: speed follows distinct experts, and quality the kept experts."""

import numpy as np

from moe_jax.evaluation.intervals import Estimate
from moe_jax.study.frontier import Frontier, Point, Quality, Rival, Speed

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128)
EXPERTS, FULL = 64, 8
# policy: experts kept per token of 8; bits per byte relative to uniform k that keeps as many; share of distinct experts
POLICIES = {
    "model": (8.0, 1.0, 1.0),
    "topk:6": (6.0, 1.0, 1.0),
    "topk:5": (5.0, 1.0, 1.0),
    "topk:4": (4.0, 1.0, 1.0),
    "topk:3": (3.0, 1.0, 1.0),
    "topk:2": (2.0, 1.0, 1.0),
    "topk:1": (1.0, 1.0, 1.0),
    "topk:4+renormalize:none": (4.0, 0.6, 1.0),
    "topk:5+opportunistic:3+renormalize:none": (4.8, 0.5, 0.7),
    "schedule:8,3,2,4": (4.3, 0.75, 1.0),
    "layers:8,8,4,4,2": (5.2, 0.7, 1.0),
    "ratio:0.3,min=2": (4.6, 0.6, 0.97),
    "median:0.5": (4.9, 0.8, 0.98),
    "mass:0.8": (5.5, 0.65, 0.98),
    "opportunistic:2": (5.6, 0.8, 0.62),
    "budget:24": (5.0, 0.9, 0.55),
    "reroute:0.5": (8.0, 0.12, 0.7),
    "capacity:1.25": (7.1, 1.2, 1.0),
    "topk:6+ratio:0.4": (4.0, 0.68, 0.95),
}
UNIFORM = ("model", "topk:6", "topk:5", "topk:4", "topk:3", "topk:2", "topk:1")
OF_THE_BATCH = ("opportunistic", "budget", "reroute", "capacity")  # with one row they keep everything


def frontier(num_layers: int = 5, policies: dict = POLICIES, concurrencies: tuple = CONCURRENCIES) -> Frontier:
    """Every policy at every concurrency, always the same; numbers are Python floats, as a sweep stores them."""
    random = np.random.default_rng(0)
    points = []
    for rows in concurrencies:
        for number, (policy, (kept, relative, share)) in enumerate(policies.items()):
            if policy.partition(":")[0] in OF_THE_BATCH:
                mix = 1 - rows**-0.5
                kept, relative, share = FULL + (kept - FULL) * mix, relative * mix, 1 + (share - 1) * mix
            shares_L, random = _shares(policy, num_layers), np.random.default_rng(number)
            quality = _quality(kept, relative, _distinct(kept, rows) * share, shares_L, random)
            speed = _speed(quality.distinct_experts, rows, random)
            rival = None if policy in UNIFORM else Rival("model", FULL, quality.increase)
            points.append(Point(policy, rival is None, rows, quality, speed, 2_000_000_000, rival))
    return Frontier(
        points,
        "the demo model (64 experts, 8 active, 5 MoE layers) on 60 held-out Python files, 0.41 MB",
        "OLMoE-1B-7B's shape with random weights in bfloat16, routing replayed from a trained model",
        "one accelerator & its host <made up>",
    )


def _distinct(kept, rows):
    return EXPERTS * (1 - (1 - kept / EXPERTS) ** (rows**0.85))


def _shares(policy, num_layers):
    """The shares of layers: uniform k is flat, all others keep more in early layers."""
    return np.ones(num_layers) if policy.startswith(("model", "topk")) else np.linspace(1.25, 0.75, num_layers)


def _quality(kept, relative, distinct, shares_L, random) -> Quality:
    kept_L = np.minimum(kept * shares_L, FULL)
    missing = max(0.0, FULL / max(kept, 1) - 1)
    more = 0.011 * relative * missing**1.7 + (0.004 * relative if kept == FULL and relative < 1 else 0.0)
    spread = 0.06 * more + (0.0002 if more else 0.0)
    more += float(random.normal(0, spread / 4))
    bits = 0.612 * (1 + more)
    return Quality(
        Estimate(bits, (bits - 0.021, bits + 0.024)),
        Estimate(more, (more - spread, more + 1.1 * spread)),
        float(kept_L.mean()),
        tuple(kept_L.tolist()),
        float(distinct),
    )


def _bytes(distinct) -> float:
    return 0.9e9 + 16 * distinct * 3 * 2048 * 1024 * 2


def _step_ms(distinct, rows) -> float:
    return 0.35 + _bytes(distinct) / 1.6e9 + 0.01 * rows


def _speed(distinct, rows, random) -> Speed:
    median = _step_ms(distinct * 0.97, rows) * float(random.normal(1, 0.002))
    reference = _step_ms(_distinct(FULL, rows) * 0.97, rows)
    gain = reference / median - 1 if abs(median / reference - 1) > 0.01 else 0.0
    interval = (gain - 0.012, gain + 0.009) if gain else (0.0, 0.0)
    return Speed(
        (median * 0.985, median, median * 1.03),
        tuple((median * np.random.default_rng(round(1e3 * distinct)).normal(1, 0.02, 5)).tolist()),
        rows / median * 1e3,
        Estimate(gain, interval),
        float(_bytes(distinct * 0.97)),
        float(distinct * 0.97),
    )
