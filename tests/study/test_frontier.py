"""The recommended policies, for points with obvious answers."""

import pytest

from moe_jax.evaluation.intervals import Estimate
from moe_jax.study.frontier import LIMITS, Frontier, Point, Quality, Speed, choices, gain

FULL_MS = (10.0, 12.0, 20.0)


def point(policy, worse, rounds_ms, uniform=False, concurrency=4):
    quality = Quality(Estimate(1.0, (0.9, 1.1)), Estimate(worse - 0.001, (worse - 0.002, worse)), 8.0, (8.0,), 8.0)
    speed = Speed((1.0, 2.0, 3.0), rounds_ms, 1.0, gain(rounds_ms, FULL_MS), 1.0, 8.0)
    return Point(policy, uniform, concurrency, quality, speed, 0)


def chosen(*points):
    frontier = Frontier([point("model", 0.0, FULL_MS, True), *points], "", "", "")
    return {choice.limit: choice for choice in choices(frontier)}


def test_the_fastest_within_the_limit_is_chosen():
    found = chosen(
        point("topk:7", 0.004, (9.0, 10.0, 18.0), True),
        point("mass:0.8", 0.005, (8.0, 10.0, 17.0)),
        point("topk:6", 0.019, (7.0, 9.0, 15.0), True),
        point("opportunistic:3", 0.021, (1.0, 1.0, 1.0)),
    )
    assert [(found[limit].best.policy, found[limit].uniform.policy) for limit in LIMITS] == [
        ("mass:0.8", "topk:7"),
        ("topk:6", "topk:6"),
    ]


def test_throughput_over_the_best_uniform_is_compared_within_rounds():
    found = chosen(point("topk:7", 0.004, (9.0, 10.0, 18.0), True), point("mass:0.8", 0.005, (8.0, 10.0, 16.0)))
    value, (first, third) = found[0.005].over_uniform
    assert value == pytest.approx(18 / 16 - 1)  # of 9/8, 1 and 18/16
    assert (first, third) == pytest.approx(((1 + 18 / 16) / 2 - 1, 9 / 8 - 1))


def test_a_uniform_policy_is_recognised_by_its_k_not_its_name():
    found = chosen(point("layers:6,6", 0.004, (5.0, 5.0, 5.0), True))
    assert found[0.005].uniform.policy == "layers:6,6" and found[0.005].over_uniform == (0.0, (0.0, 0.0))
