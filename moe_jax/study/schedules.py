"""Schedules, one number of experts for each MoE layer: the cheapest for a budget, moves, and published families."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.routing.policies.columns import model_facts
from moe_jax.routing.policies.schedule import Schedule

KPerLayer = tuple[int, ...]


def totals(budgets: Sequence[float], architecture: Architecture) -> list[int]:
    """The number of experts of all MoE layers together that each mean stands for.

    Raises:
        ValueError: a budget is below 1 or above the model's own, or no whole numbers have this mean.
    """
    layers, most = architecture.decoder.num_moe_layers, sum(architecture.k_L)
    if most == layers:
        raise ValueError("the model's own k is 1 in every MoE layer: expected a larger one, so that there is a choice")
    found = []
    for budget in budgets:
        if not 1 <= budget <= most / layers:
            raise ValueError(
                f"search.budgets: {budget:g}: expected 1 to {most / layers:g}, the mean of the model's own k over its "
                f"{layers} MoE layers"
            )
        total = round(budget * layers)
        if abs(budget * layers - total) > 1e-3:
            low = int(budget * layers)
            raise ValueError(
                f"search.budgets: {budget:g}: expected a mean of {layers} whole numbers, such as {low / layers:.6g} or "
                f"{(low + 1) / layers:.6g}"
            )
        found.append(total)
    return found


def cheapest(cost_LK: np.ndarray, total: int) -> KPerLayer:
    """The schedule of a total with the least sum of costs, by dynamic programming: exact.

    Of schedules with equal sums, it takes the one with more experts in later layers.

    Args:
        cost_LK: the cost of k experts in a layer, at index k - 1; inf: the layer cannot have k.
        total: experts of all layers together.

    Raises:
        ValueError: no schedule has this total.
    """
    layers, most = cost_LK.shape
    best = np.full(total + 1, np.inf)  # by total: the least cost of the layers so far
    best[0] = 0.0
    taken = []  # for each layer, by total: the k of that least cost
    for cost_K in cost_LK:
        sums = np.full((most, total + 1), np.inf)
        for k in range(1, min(most, total) + 1):
            sums[k - 1, k:] = best[: total + 1 - k] + cost_K[k - 1]
        best = sums.min(axis=0)
        taken.append(most - np.argmin(sums[::-1], axis=0))
    if not np.isfinite(best[total]):
        raise ValueError(f"{total} experts in {layers} layers: expected a total that the layers can have")
    schedule = []
    for taken_here in reversed(taken):
        schedule.append(int(taken_here[total]))
        total -= schedule[-1]
    return tuple(reversed(schedule))


def moves(k_L: KPerLayer, cost_LK: np.ndarray) -> list[KPerLayer]:
    """All schedules with one expert more in one layer and one less in another, the most promising first.

    Args:
        k_L: the schedule from which they differ.
        cost_LK: as `cheapest` takes it; moves are sorted by its sum.
    """
    layers, most = cost_LK.shape
    found = []
    for up, down in itertools.permutations(range(layers), 2):
        if k_L[up] == most or k_L[down] == 1 or not np.isfinite(cost_LK[up, k_L[up]]):
            continue
        moved = list(k_L)
        moved[up] += 1
        moved[down] -= 1
        found.append(tuple(moved))
    return sorted(found, key=lambda moved: (sum_of(cost_LK, moved), moved))


def sum_of(cost_LK: np.ndarray, k_L: KPerLayer) -> float:
    """The sum of a schedule's costs over layers."""
    return float(cost_LK[np.arange(len(k_L)), np.array(k_L) - 1].sum())


def linear(architecture: Architecture, total: int) -> Mapping[KPerLayer, str]:
    """All different schedules (b,h,e,p) of a total, and for each the first spec that gives it, in order of specs.

    Those of arXiv 2505.03531, as the policy `schedule` computes them. Layers keep at most their own k; there are none
    with fewer than three MoE layers.
    """
    model, own_L = model_facts(architecture, None), np.array(architecture.k_L)
    counts = range(1, max(own_L) + 1)
    found = {}
    for b, h, e, p in itertools.product(counts, counts, counts, range(1, model.num_layers - 1)):
        kind = Schedule(b, h, e, p)
        [k_L] = kind.columns(model)
        if k_L.sum() == total and (k_L <= own_L).all():
            found.setdefault(tuple(k_L.tolist()), kind.spec)
    return found
