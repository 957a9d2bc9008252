"""How far two costs of schedules agree in rank: a proxy's or a sum's, and the measured one."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.study.schedules import KPerLayer, sum_of


class Agreement(NamedTuple):
    """Spearman's correlation with measured costs; nan where there are fewer than three different costs."""

    layers_and_k: float  # over all layers and all k below a layer's own
    across_layers: float  # over layers at the same k: the mean over k
    schedules_of_budgets: tuple[float, ...]  # for each budget, over its schedules (b,h,e,p): of the sum over layers


def agreement(cost_LK: np.ndarray, measured_LK: np.ndarray, schedules: list[Mapping[KPerLayer, float]]) -> Agreement:
    """Compares costs per layer and k with measured ones.

    Args:
        cost_LK: at index k - 1; inf where a layer has no such k.
        measured_LK: the measured marginal costs, 0 at a layer's own k.
        schedules: for each budget, measured costs of schedules.
    """
    below_LK = np.isfinite(measured_LK) & (measured_LK > 0)
    across = [
        spearman(cost_LK[below_LK[:, k], k], measured_LK[below_LK[:, k], k])
        for k in range(below_LK.shape[1])
        if below_LK[:, k].sum() > 2
    ]
    return Agreement(
        spearman(cost_LK[below_LK], measured_LK[below_LK]),
        float(np.mean(across)) if across else float("nan"),
        ranks_of_schedules(cost_LK, schedules),
    )


def ranks_of_schedules(cost_LK: np.ndarray, schedules: list[Mapping[KPerLayer, float]]) -> tuple[float, ...]:
    """For each budget, Spearman's correlation of the sums of costs per layer with the measured costs of schedules."""
    return tuple(
        spearman(np.array([sum_of(cost_LK, k_L) for k_L in costs]), np.array(list(costs.values())))
        for costs in schedules
    )


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share their mean rank. nan: fewer than three values, or all equal."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
