"""Estimates with 95% intervals: ratios of sums over documents, and paired differences between policies.

Documents are resampled whole (the bootstrap; Efron, 1979), since values within one document are correlated. All
intervals for one text use the same resamples.
"""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    ci95: tuple[float, float]


def ratio(part_J: np.ndarray, whole_J: np.ndarray, seed: int = 0) -> Estimate:
    """The sum of parts over the sum of wholes: bits over bytes, right answers over questions.

    Args:
        part_J: a value for each document.
        whole_J: a value for each document, 0 or more; documents with 0 are left out.
        seed: the seed of the resampling.
    """
    part_J, whole_J = part_J[whole_J > 0], whole_J[whole_J > 0]
    parts, wholes = (_resampled(values, seed) for values in (part_J, whole_J))
    return _estimate(part_J.sum() / whole_J.sum(), parts / wholes)


def paired_difference(part_J: np.ndarray, reference_J: np.ndarray, whole_J: np.ndarray, seed: int = 0) -> Estimate:
    """The difference from the reference, in the unit of the ratio.

    Documents are resampled in pairs, so the spread between documents cancels.
    """
    return ratio(part_J - reference_J, whole_J, seed)


def paired_ratio(part_J: np.ndarray, reference_J: np.ndarray, seed: int = 0) -> Estimate:
    """The difference from the reference as a fraction of it: 0.01 is one percent more bits for the same text."""
    parts, references = (_resampled(values, seed) for values in (part_J, reference_J))
    return _estimate(part_J.sum() / reference_J.sum() - 1, parts / references - 1)


def recovered(before_J: np.ndarray, after_J: np.ndarray, full_J: np.ndarray, seed: int = 0) -> Estimate:
    """The share of a policy's loss that is recovered: (before - after) / (before - full), sums over documents.

    Args:
        before_J: a value for each document under the policy, before.
        after_J: the same, after.
        full_J: the same under the full model.
        seed: the seed of the resampling.
    """
    befores, afters, fulls = (_resampled(values, seed) for values in (before_J, after_J, full_J))
    value = (before_J.sum() - after_J.sum()) / (before_J.sum() - full_J.sum())
    return _estimate(value, (befores - afters) / (befores - fulls))


def _resampled(values_J: np.ndarray, seed: int) -> np.ndarray:
    picked = np.random.default_rng(seed).integers(len(values_J), size=(RESAMPLES, len(values_J)))
    return values_J[picked].sum(axis=1)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), (float(low), float(high)))
