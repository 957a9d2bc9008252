"""The frontier: what each policy costs in quality and gains in speed at each concurrency, and which one to choose."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.evaluation.intervals import Estimate

LIMITS = (0.005, 0.02)  # how much worse than the full model a recommended policy may be


class Quality(NamedTuple):
    """Quality of a policy on the trained model."""

    bits_per_byte: Estimate
    increase: Estimate  # bits per byte relative to the full model, 0.01 is 1% more; paired by document
    experts_per_token: float  # slots kept, mean over tokens and MoE layers
    kept_L: tuple[float, ...]  # the same for each MoE layer
    distinct_experts: float  # run by one MoE layer in one decode step at this concurrency, mean


class Speed(NamedTuple):
    """Speed of a decode step of the timed model."""

    quartiles_ms: tuple[float, float, float]
    rounds_ms: tuple[float, ...]  # mean of each round's steps
    tokens_per_s: float  # of all rows together, at the median step
    gain: Estimate  # throughput relative to the full model in the same rounds, 0.1 is 10% more; interval: quartiles
    bytes: float  # the least that a step has to read and write
    distinct_experts: float  # as in `Quality`, but of the timed steps


class Rival(NamedTuple):
    """The uniform k with the fewest distinct experts among those that run at least as many as a policy."""

    policy: str
    distinct_experts: float
    difference: Estimate  # bits per byte of the policy relative to the rival, paired; below zero the policy is better


class Point(NamedTuple):
    """One policy at one concurrency."""

    policy: str  # its spec, or the name of a pruned model
    uniform: bool  # whether it keeps the same number of experts in every layer, for every token and concurrency
    concurrency: int  # rows of a decode step
    quality: Quality
    speed: Speed
    weights_bytes: int  # memory that the weights of the timed model take, with as many experts as were measured
    rival: Rival | None = None  # None: the policy is uniform itself, or no uniform policy runs as many experts


class Choice(NamedTuple):
    """The fastest policy within a quality limit at one concurrency, and the fastest uniform one."""

    concurrency: int
    limit: float  # on the upper end of the interval of `Quality.increase`
    best: Point
    uniform: Point
    over_uniform: Estimate  # throughput of `best` relative to `uniform`, as in `Speed.gain`


class Frontier(NamedTuple):
    """All points of a sweep."""

    points: Sequence[Point]
    quality_subject: str  # model and text on which quality was measured, in words
    speed_subject: str  # model and routing that were timed, in words
    machine: str


def choices(frontier: Frontier) -> list[Choice]:
    """The recommended policy for every concurrency and limit."""
    recommended = []
    for concurrency in sorted({point.concurrency for point in frontier.points}):
        at_concurrency = [point for point in frontier.points if point.concurrency == concurrency]
        for limit in LIMITS:
            allowed = [point for point in at_concurrency if point.quality.increase.ci95[1] <= limit]
            best, uniform = _fastest(allowed), _fastest([point for point in allowed if point.uniform])
            over_uniform = gain(best.speed.rounds_ms, uniform.speed.rounds_ms)
            recommended.append(Choice(concurrency, limit, best, uniform, over_uniform))
    return recommended


def gain(rounds_ms: Sequence[float], reference_ms: Sequence[float]) -> Estimate:
    """Gain in throughput over a reference in the same rounds, 0.1 is 10% more: median and quartiles over rounds."""
    first, median, third = np.percentile(np.divide(reference_ms, rounds_ms) - 1, (25, 50, 75)).tolist()
    return Estimate(median, (first, third))


def _fastest(points: Sequence[Point]) -> Point:
    return max(points, key=lambda point: point.speed.gain.value)
