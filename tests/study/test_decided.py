"""What policies keep of recorded experts, against loops over rows."""

import math

import numpy as np
import pytest

from moe_jax.engine.request import execution_of
from moe_jax.routing.policies.parse import parse
from moe_jax.study.decided import decide
from tests import tiny_model

EXECUTION = execution_of(tiny_model.ARCHITECTURE)
LAYERS, EXPERTS, K = tiny_model.ARCHITECTURE.decoder.num_moe_layers, 16, 8
STEPS, ROWS = 2, 3


@pytest.fixture(scope="module")
def recorded():
    """expert_SLBK, the best first; rows prefer the first experts, so that they share some."""
    random = np.random.default_rng(0)
    liking = random.gumbel(size=(STEPS, LAYERS, ROWS, EXPERTS)) - np.arange(EXPERTS) / 2
    return np.argsort(-liking, axis=3)[..., :K]


def steps_of(spec, recorded):
    """Pairs for each step and layer: the recorded experts [B, K], and the kept ones of each row, as lists."""
    chosen_SLBK = decide(parse(spec), recorded, EXECUTION)
    assert chosen_SLBK.shape == recorded.shape
    for step in range(STEPS):
        for layer in range(LAYERS):
            rows = chosen_SLBK[step, layer]
            kept = [row[row >= 0].tolist() for row in rows]
            assert all(len({*row}) == len(row) for row in kept)
            yield recorded[step, layer], kept


@pytest.mark.parametrize(("spec", "k"), [("model", 8), ("topk:3", 3)])
def test_a_fixed_number_keeps_the_best(recorded, spec, k):
    for experts_BK, kept in steps_of(spec, recorded):
        assert kept == experts_BK[:, :k].tolist()


def test_opportunistic_rows_share_the_best_of_all(recorded):
    smaller = 0
    for experts_BK, kept in steps_of("opportunistic:2", recorded):
        pool = {*experts_BK[:, :2].ravel().tolist()}
        for own, row in zip(experts_BK.tolist(), kept, strict=True):
            shared = [expert for expert in own if expert in pool]
            assert row[: len(shared)] == shared  # its own come first, in their order
            assert {*row} <= pool and len(row) == min(K, len(pool))
        assert {expert for row in kept for expert in row} == pool
        smaller += len(pool) < K
    assert smaller


def test_a_budget_is_spent_on_the_experts_that_rank_highest_over_the_rows(recorded):
    for experts_BK, kept in steps_of("budget:9", recorded):
        weight_E = np.zeros(EXPERTS)
        for row in experts_BK:
            weight_E[row] += K - np.arange(K)
        ran = {expert for row in kept for expert in row}
        assert {*experts_BK[:, 0].tolist()} <= ran and len(ran) == 9
        left_out = max(weight_E[[expert for expert in range(EXPERTS) if expert not in ran]])
        added = [weight_E[expert] for expert in ran if expert not in experts_BK[:, 0]]
        assert min(added) > left_out - ROWS  # what was not recorded weighs less than one for each row


def test_capacity_drops_those_that_rank_an_expert_lowest(recorded):
    dropped = 0
    room = math.ceil(0.5 * ROWS * K / EXPERTS)
    for experts_BK, kept in steps_of("capacity:0.5", recorded):
        for expert in range(EXPERTS):
            ranks = [row.index(expert) if expert in row else K for row in experts_BK.tolist()]
            asking = sorted((rank, row) for row, rank in enumerate(ranks) if rank < K)
            assert [row for _, row in asking[:room]] == sorted(
                (row for row in range(ROWS) if expert in kept[row]), key=lambda row: (ranks[row], row)
            )
            dropped += len(asking) > room
    assert dropped


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mass:0.8", r"policy 'mass:0.8': mass:0.8 compares weights, and recorded routing has none: expected"),
        ("topk:4+ratio:0.3", "ratio:0.3 compares weights"),
        ("topk:9", "expected 1 to 8 experts"),
    ],
)
def test_what_a_recording_does_not_hold_is_refused(recorded, spec, message):
    with pytest.raises(ValueError, match=message):
        decide(parse(spec), recorded, EXECUTION)
