"""Measured costs, LExI's proxy and the search itself, against plain loops, on a model whose layers differ."""

import itertools

import jax
import numpy as np
import pytest
from scipy import stats

import moe_jax
from moe_jax import checkpoint
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.journal import Journal
from moe_jax.study import lexi, rank_agreement, schedule_search, schedules
from moe_jax.study.schedule_search import Policies, spec_of
from tests import tiny_model

ARCHITECTURE = tiny_model.changed(
    decoder={"num_layers": 4}, moe={"k": 4, "k_of_layers": (4, 3, 2), "num_experts_of_layers": (16, 16, 6)}
)
OWN_L = (4, 3, 2)
PARAMS = tiny_model.random_params(ARCHITECTURE)
RULE = "+renormalize:none"


@pytest.fixture(scope="module")
def tokens_JT():
    return np.random.default_rng(0).integers(0, 512, (3, 13), dtype=np.int32)


@pytest.fixture(scope="module")
def measured(tokens_JT):
    return Policies(PARAMS, tokens_JT, execution_of(ARCHITECTURE), Journal(None, {}), "calibration")


@pytest.fixture(scope="module")
def alone(tokens_JT):
    """(nats, KL) of one policy, of every window: one call of the model for each."""
    model = moe_jax.Model(checkpoint.new(ARCHITECTURE, tiny_model.tokenizer()), PARAMS)

    def log_p(spec):
        logits_JTV = np.float64(model.logits(tokens_JT[:, :-1], policy=spec))
        return logits_JTV - np.log(np.exp(logits_JTV).sum(axis=2, keepdims=True))

    full_JTV = log_p("model")

    def one(spec):
        own_JTV = log_p(spec)
        nats_J = -np.take_along_axis(own_JTV, tokens_JT[:, 1:, None], axis=2).sum(axis=(1, 2))
        return nats_J, (np.exp(full_JTV) * (full_JTV - own_JTV)).sum(axis=(1, 2))

    return one


@pytest.mark.parametrize("rule", ["", RULE])
def test_marginal_costs_equal_evaluations_one_by_one(measured, alone, tokens_JT, rule):
    cost_LK = schedule_search.marginal_costs(measured, ARCHITECTURE, rule)
    assert cost_LK.shape == (3, 4)
    for layer, k in itertools.product(range(3), range(1, 5)):
        if k > OWN_L[layer]:
            assert cost_LK[layer, k - 1] == np.inf
            continue
        k_L = list(OWN_L)
        k_L[layer] = k
        expected = alone(spec_of(k_L, rule))[1].sum() / tokens_JT[:, 1:].size
        assert cost_LK[layer, k - 1] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert (cost_LK[layer, k - 1] == 0) == (k == OWN_L[layer])


def test_policies_are_scored_together_as_alone_and_each_once(tokens_JT, alone):
    counted = []
    scored = Policies(PARAMS, tokens_JT, execution_of(ARCHITECTURE), Journal(None, {}), "text", counted.append)
    specs = ["topk:2", "model", f"layers:1,2,2{RULE}", "layers:2,2,2", "layers:4,3,2", "topk:2"]
    together = scored.score(specs)
    for place, spec in enumerate(specs):
        nats_J, kl_J = alone(spec)
        np.testing.assert_allclose(together.nats_JP[:, place], nats_J, rtol=1e-5)
        np.testing.assert_allclose(together.kl_JP[:, place], kl_J, rtol=1e-3, atol=1e-5)
    assert sum(counted) == scored.count == 3
    scored.score(specs[:3])
    assert sum(counted) == 3


def test_refinement_takes_every_improvement_and_never_worsens(measured):
    for rule, total in itertools.product(["", RULE], range(3, 10)):
        cost_LK = schedule_search.marginal_costs(measured, ARCHITECTURE, rule)
        dearest = schedules.cheapest(np.where(np.isinf(cost_LK), np.inf, -cost_LK), total)
        for start in (schedules.cheapest(cost_LK, total), dearest):
            [before] = measured.costs([spec_of(start, rule)])
            k_L, cost = schedule_search.refined(measured, cost_LK, start, float(before), rule)
            assert sum(k_L) == total and (np.array(k_L) <= OWN_L).all() and cost <= before
            assert cost == measured.costs([spec_of(k_L, rule)])[0]
            neighbours = [
                one
                for one in itertools.product(range(1, 5), range(1, 4), range(1, 3))
                if sorted(np.subtract(one, k_L)) == [-1, 0, 1]
            ]
            assert not neighbours or cost <= measured.costs(spec_of(one, rule) for one in neighbours).min()


def test_the_better_rule_comes_first(measured):
    marginal_LK = {rule: schedule_search.marginal_costs(measured, ARCHITECTURE, rule) for rule in ("", RULE)}
    for total in range(3, 10):
        found = schedule_search.search(measured, marginal_LK, total)
        assert sorted(one.spec.endswith(RULE) for one in found) == [False, True]
        assert found[0].cost <= found[1].cost
        for one in found:
            assert one.cost == measured.costs([one.spec])[0] <= one.start_cost


def test_lexi_equals_a_plain_loop(monkeypatch):
    monkeypatch.setattr(lexi, "DRAWS", 2)
    monkeypatch.setattr(lexi, "TOKENS", 12)
    found_LK = lexi.sensitivities(PARAMS, execution_of(ARCHITECTURE), 5)
    places = [("moe", 0), ("moe", 1), ("moe_6", 0)]
    for column, (stack, index) in enumerate(places):
        weights = jax.tree.map(np.float64, PARAMS[stack])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(5), column), 2)
        norms_K = np.zeros(OWN_L[column])
        for key in keys:
            x_ND = np.float64(jax.random.normal(key, (12, 64)))
            y_KND = np.zeros((OWN_L[column], *x_ND.shape))
            for n, x in enumerate(x_ND):
                mix_E = 1 / (1 + np.exp(-weights["router"]["weight_LED"][index] @ x))
                order = np.argsort(-(mix_E + weights["router"]["bias_LE"][index]))
                for k in range(1, OWN_L[column] + 1):
                    for e in order[:k]:
                        gate_F, up_F = weights["experts"]["gate_up_LEIFD"][index, e] @ x
                        out_D = weights["experts"]["down_LEDF"][index, e] @ (gate_F / (1 + np.exp(-gate_F)) * up_F)
                        y_KND[k - 1, n] += mix_E[e] / mix_E[order[:k]].sum() * out_D
            norms_K += [np.linalg.norm(y_ND - y_KND[-1]) / 2 for y_ND in y_KND]
        np.testing.assert_allclose(found_LK[column, : OWN_L[column]], norms_K, rtol=1e-4, atol=1e-5)
        assert (found_LK[column, OWN_L[column] :] == np.inf).all() and found_LK[column, OWN_L[column] - 1] == 0


def test_rank_agreement_equals_scipys():
    random = np.random.default_rng(0)
    one, other = random.integers(0, 5, 20), random.normal(size=20)
    assert rank_agreement.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert np.isnan(rank_agreement.spearman(one[:2], other[:2])) and np.isnan(rank_agreement.spearman(one * 0, other))
    measured_LK = np.array([[3.0, 2.0, 0.0], [5.0, 1.0, 0.0], [4.0, 3.0, 0.0], [1.0, 0.0, np.inf]])
    proxy_LK = np.array([[3.0, 1.0, 0.0], [4.0, 2.0, 0.0], [9.0, 3.0, 0.0], [1.0, 0.0, np.inf]])
    costs = [{(1, 1, 1, 1): 9.0, (2, 1, 1, 1): 5.0, (1, 2, 1, 1): 7.0}, {}]
    found = rank_agreement.agreement(proxy_LK, measured_LK, costs)
    below = ([3, 1, 4, 2, 9, 3, 1], [3, 2, 5, 1, 4, 3, 1])
    assert found.layers_and_k == pytest.approx(stats.spearmanr(*below).statistic)
    by_k = [([3, 4, 9, 1], [3, 5, 4, 1]), ([1, 2, 3], [2, 1, 3])]
    assert found.across_layers == pytest.approx(np.mean([stats.spearmanr(*pair).statistic for pair in by_k]))
    assert found.schedules_of_budgets[0] == pytest.approx(stats.spearmanr([17, 15, 15], [9, 5, 7]).statistic)
    assert np.isnan(found.schedules_of_budgets[1])
