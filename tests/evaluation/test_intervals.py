"""Intervals cover as often as stated, on known distributions and on the measured figures of the shipped model."""

import csv
import pathlib

import numpy as np
import pytest

from moe_jax.evaluation.intervals import paired_difference, paired_ratio, ratio, recovered

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "evaluate_demo"


def test_intervals_cover():
    """Documents sampled from a known distribution: 95% intervals contain its mean about 95 times in 100."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        sizes = rng.integers(1000, 5000, size=80)
        bits = sizes * rng.normal(1.5, 0.3, size=80)
        low, high = ratio(bits, sizes, seed=trial).ci95
        held += low <= 1.5 <= high
    assert 88 <= held <= 99


def test_pairing_cancels_the_spread_between_documents():
    rng = np.random.default_rng(0)
    reference, sizes = rng.uniform(1e3, 1e5, size=50), np.full(50, 1e4)
    worse = paired_ratio(reference * 1.02, reference)
    np.testing.assert_allclose([worse.value, *worse.ci95], 0.02, rtol=1e-9)
    assert paired_ratio(reference, reference).value == 0
    more = paired_difference(reference + 5.0, reference, sizes)
    np.testing.assert_allclose([more.value, *more.ci95], 5e-4, rtol=1e-9)
    unpaired = ratio(reference + 5.0, sizes)
    assert unpaired.ci95[1] - unpaired.ci95[0] > 1.0


def test_documents_without_questions_are_left_out():
    part, whole = np.array([3.0, 1.0, 0.0, 0.0]), np.array([4.0, 2.0, 0.0, 0.0])
    assert ratio(part, whole) == ratio(part[:2], whole[:2])


@pytest.mark.parametrize("policy", [f"topk:{k}" for k in range(8, 0, -1)])
def test_intervals_of_half_the_held_out_files_contain_the_figure_of_all(policy):
    """20 random halves: the interval of a half contains the figure of all files at least 17 times."""
    with open(RESULTS / "documents.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    bits, sizes, first = (np.array([float(line[name]) for line in lines]) for name in (policy, "bytes", "topk:8"))
    rng = np.random.default_rng(0)
    held, held_paired = 0, 0
    for _ in range(20):
        half = rng.choice(len(lines), len(lines) // 2, replace=False)
        low, high = ratio(bits[half], sizes[half]).ci95
        held += low <= bits.sum() / sizes.sum() <= high
        low, high = paired_ratio(bits[half], first[half]).ci95
        held_paired += low <= bits.sum() / first.sum() - 1 <= high
    assert len(lines) == 304 and held >= 17 and held_paired >= 17


def test_recovered_is_the_share_of_the_loss_won_back():
    rng = np.random.default_rng(0)
    full = rng.uniform(1e3, 1e5, size=50)
    before, after = full * 1.04, full * 1.01
    share = recovered(before, after, full)
    np.testing.assert_allclose([share.value, *share.ci95], 0.75, rtol=1e-9)
    assert recovered(before, before, full).value == 0 and recovered(before, full * 0.99, full).value > 1
    noisy = recovered(before, after + rng.normal(0, 300, size=50), full)
    assert noisy.ci95[0] < noisy.value < noisy.ci95[1]
