"""Schedules of a budget against enumeration of all: the cheapest, moves and the family (b,h,e,p)."""

import itertools
import math
import re

import numpy as np
import pytest

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from moe_jax.study import schedules
from tests import tiny_model


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_schedule_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    cost_LK = random.exponential(size=(4, 5))
    if seed % 2:  # some layers cannot have as many
        cost_LK[1, 3:], cost_LK[2, 2:] = np.inf, np.inf
    for total in range(4, 21):
        sums = {
            k_L: math.fsum(cost_LK[layer, k - 1] for layer, k in enumerate(k_L))
            for k_L in itertools.product(range(1, 6), repeat=4)
            if sum(k_L) == total
        }
        best = min(sums, key=sums.__getitem__)
        if math.isinf(sums[best]):
            with pytest.raises(ValueError, match="expected a total that the layers can have"):
                schedules.cheapest(cost_LK, total)
            continue
        assert schedules.cheapest(cost_LK, total) == best
        assert schedules.sum_of(cost_LK, best) == pytest.approx(sums[best])


def test_of_equal_schedules_later_layers_get_more():
    assert schedules.cheapest(np.zeros((3, 4)), 6) == (1, 1, 4)


def test_moves_are_all_neighbours_in_the_order_of_their_sums():
    cost_LK = np.random.default_rng(0).exponential(size=(4, 5))
    cost_LK[1, 3:] = np.inf
    k_L = (5, 3, 1, 2)
    moved = schedules.moves(k_L, cost_LK)
    expected = [
        one
        for one in itertools.product(range(1, 6), range(1, 4), range(1, 6), range(1, 6))
        if sorted(np.subtract(one, k_L)) == [-1, 0, 0, 1]
    ]
    assert sorted(moved) == sorted(expected)
    sums = [schedules.sum_of(cost_LK, one) for one in moved]
    assert sums == sorted(sums)


def linear_by_hand(b, h, e, p, layers):
    """The schedule in whole numbers: halves round up."""
    found = []
    for layer in range(layers):
        (start, first), (end, last) = ((0, b), (p, h)) if layer <= p else ((p, h), (layers - 1, e))
        numerator, width = first * (end - layer) + last * (layer - start), end - start
        found.append((2 * numerator + width) // (2 * width))
    return tuple(found)


@pytest.mark.parametrize(("layers", "k"), [(3, 4), (5, 4), (6, 3)])
def test_linear_schedules_are_all_of_their_total(layers, k):
    architecture = tiny_model.layers_of(MoEConfig(num_experts=8, k=k), layers)
    every = {
        linear_by_hand(b, h, e, p, layers)
        for b, h, e in itertools.product(range(1, k + 1), repeat=3)
        for p in range(1, layers - 1)
    }
    for total in range(layers, layers * k + 1):
        found = schedules.linear(architecture, total)
        assert set(found) == {k_L for k_L in every if sum(k_L) == total}
        for k_L, spec in found.items():
            live = policies.settings([parse(spec)], architecture, k)
            assert tuple(np.asarray(live.columns_BL["k"])[0].tolist()) == k_L
    assert set(schedules.linear(architecture, layers * k).values()) == {f"schedule:{k},{k},{k},1"}


def test_linear_schedules_keep_to_each_layers_own_k_and_need_three_layers():
    uneven = MoEConfig(num_experts=8, k=4, k_of_layers=(4, 2, 4))
    found = schedules.linear(tiny_model.layers_of(uneven, 3), 7)
    assert found and max(k_L[1] for k_L in found) == 2
    assert schedules.linear(tiny_model.layers_of(MoEConfig(num_experts=8, k=4), 2), 5) == {}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.5, "search.budgets: 0.5: expected 1 to 3, the mean of the model's own k over its 4 MoE layers"),
        (3.25, "search.budgets: 3.25: expected 1 to 3"),
        (2.1, "2.1: expected a mean of 4 whole numbers, such as 2 or 2.25"),
    ],
)
def test_impossible_budgets_are_refused(budget, expected):
    uneven = MoEConfig(num_experts=8, k=4, k_of_layers=(4, 2, 2, 4))
    architecture = tiny_model.layers_of(uneven, 4)
    with pytest.raises(ValueError, match=re.escape(expected)):
        schedules.totals([2, budget], architecture)
    assert schedules.totals([1, 2.25, 3.0], architecture) == [4, 9, 12]
    with pytest.raises(ValueError, match="own k is 1 in every MoE layer: expected a larger one"):
        schedules.totals([1], tiny_model.layers_of(MoEConfig(num_experts=8, k=1), 4))
