"""The frontier: what each policy costs in quality and buys in speed at each load, and which one to choose there."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.evaluation.intervals import Estimate

LIMITS = (0.005, 0.02)  # how much worse than the full model a recommended policy may be


class Quality(NamedTuple):
    """What a policy is worth on the trained model."""

    bits_per_byte: Estimate
    increase: Estimate  # of bits per byte over the full model's, a fraction, paired by document
    experts_per_token: float  # slots kept, mean over tokens and MoE layers
    kept_L: tuple[float, ...]  # the same of each MoE layer
    distinct_experts: float  # that one MoE layer runs in one decode step of that many rows, mean


class Speed(NamedTuple):
    """How fast a decode step of the timed model is."""

    quartiles_ms: tuple[float, float, float]
    rounds_ms: tuple[float, ...]  # mean of each round's steps
    tokens_per_s: float  # of all rows together, at the median
    gain: Estimate  # of throughput over the full model's in the same rounds: 0.1 is 10% more; the interval: quartiles
    bytes: float  # that a step has to read and write at the least
    distinct_experts: float  # of the steps that were timed; as in `Quality`


class Rival(NamedTuple):
    """The uniform k that runs as many distinct experts as a policy does, or the next more that there are."""

    policy: str
    distinct_experts: float
    difference: Estimate  # bits per byte of the policy over the rival's, a fraction, paired: below zero, it is better


class Point(NamedTuple):
    """One policy at one load."""

    policy: str  # its spec
    uniform: bool  # it keeps the same number of experts in every layer, for every token and load
    concurrency: int  # rows of a decode step
    quality: Quality
    speed: Speed
    rival: Rival | None = None  # None: the policy is uniform itself, or no uniform one runs as many


class Choice(NamedTuple):
    """The fastest policy at a load that is at most so much worse, beside the fastest uniform one that is."""

    concurrency: int
    limit: float  # on the upper end of the interval of `Quality.increase`
    best: Point
    uniform: Point
    over_uniform: Estimate  # throughput of the best over that of the uniform, as `Speed.gain`


class Frontier(NamedTuple):
    """All points of a sweep."""

    points: Sequence[Point]
    quality_subject: str  # which model and text the quality is of, in words
    speed_subject: str  # which model and routing the speed is of
    machine: str


def choices(frontier: Frontier) -> list[Choice]:
    """The recommended policy of every load and limit."""
    found = []
    for concurrency in sorted({point.concurrency for point in frontier.points}):
        at_load = [point for point in frontier.points if point.concurrency == concurrency]
        for limit in LIMITS:
            allowed = [point for point in at_load if point.quality.increase.ci95[1] <= limit]
            best, uniform = _fastest(allowed), _fastest([point for point in allowed if point.uniform])
            over_uniform = gain(best.speed.rounds_ms, uniform.speed.rounds_ms)
            found.append(Choice(concurrency, limit, best, uniform, over_uniform))
    return found


def gain(rounds_ms: Sequence[float], reference_ms: Sequence[float]) -> Estimate:
    """How much more throughput than a reference's in the same rounds, a fraction: median, and quartiles of rounds."""
    first, median, third = np.percentile(np.divide(reference_ms, rounds_ms) - 1, (25, 50, 75)).tolist()
    return Estimate(median, (first, third))


def _fastest(points: Sequence[Point]) -> Point:
    return max(points, key=lambda point: point.speed.gain.value)
