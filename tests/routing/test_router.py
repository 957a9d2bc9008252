"""Scores, groups and weights against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing import balance
from moe_jax.routing.policies import Context, select, settings
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.router import route
from moe_jax.routing.selection import Routing, Selection
from tests import tiny_model

BASE = MoEConfig(num_experts=16, k=4)
SOFTMAX = {"score": "softmax", "selection_bias": False, "normalize": False}
VARIANTS = {
    "sigmoid": BASE,
    "softmax": dataclasses.replace(BASE, score="softmax", selection_bias=False),
    "not_normalized": dataclasses.replace(BASE, score="softmax", selection_bias=False, normalize=False),
    "scaled": dataclasses.replace(BASE, routed_scaling=2.5),
    "groups": dataclasses.replace(BASE, num_groups=4, num_groups_kept=2),
    "groups_by_their_best": dataclasses.replace(
        BASE, **SOFTMAX, num_groups=4, num_groups_kept=2, group_score="best", routed_scaling=16.0
    ),
}
N, D = 21, 12


def plain_selection(x, weight, bias, moe, k):
    """One token at a time, as in the models' papers."""
    experts, weights = [], []
    for row in np.asarray(x, np.float64):
        logits = np.asarray(weight, np.float64) @ row
        mix = np.exp(logits) / np.exp(logits).sum() if moe.score == "softmax" else 1 / (1 + np.exp(-logits))
        score = mix + (bias if moe.selection_bias else 0)
        if moe.num_groups > 1:
            groups = np.split(np.arange(moe.num_experts), moe.num_groups)
            counted = 1 if moe.group_score == "best" else 2
            group_score = [sum(sorted(score[group], reverse=True)[:counted]) for group in groups]
            best = np.argsort(group_score)[::-1][: moe.num_groups_kept]
            reachable = np.concatenate([groups[g] for g in best])
        else:
            reachable = np.arange(moe.num_experts)
        chosen = sorted(reachable, key=lambda e: -score[e])[:k]
        weight_of = mix[chosen] / mix[chosen].sum() if moe.normalize else mix[chosen]
        experts.append(chosen)
        weights.append(weight_of * moe.routed_scaling)
    return np.array(experts), np.array(weights)


def test_a_group_with_one_strong_expert_wins_only_if_its_best_expert_counts():
    logits = np.array([[2.0, -4.0, 1.5, 1.5]], np.float32)  # two groups of two experts
    moe = MoEConfig(num_experts=4, k=1, score="sigmoid", num_groups=2, num_groups_kept=1)
    for group_score, expected in (("best_two", [2, 3]), ("best", [0, 1])):
        routing = route(logits, np.eye(4, dtype=np.float32), None, dataclasses.replace(moe, group_score=group_score))
        assert np.flatnonzero(np.isfinite(routing.score_NE[0])).tolist() == expected


@pytest.mark.parametrize("k", [1, 3, 4, 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_selection_equals_a_plain_loop(variant, k):
    moe = VARIANTS[variant]
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((N, D)), rng.standard_normal((moe.num_experts, D))
    bias = rng.standard_normal(moe.num_experts) * 0.1
    x32, weight32, bias32 = (np.asarray(part, np.float32) for part in (x, weight, bias))
    routing = route(x32, weight32, bias32 if moe.selection_bias else None, moe)
    live = settings([parse(f"topk:{k}")], tiny_model.layers_of(moe, 1), 6)
    context = Context(jnp.int32(0), jnp.zeros(N, jnp.int32), jnp.ones(N, bool), 0)
    selection = select(routing, live, context, moe, 6)
    experts, weights = plain_selection(x32, weight32, bias32, moe, k)
    np.testing.assert_array_equal(selection.expert_NK[:, :k], experts)
    np.testing.assert_allclose(selection.weight_NK[:, :k], weights, rtol=1e-5)
    np.testing.assert_array_equal(selection.keep_NK, np.tile(np.arange(6) < k, (N, 1)))
    assert (np.asarray(selection.weight_NK)[:, k:] == 0).all()


def test_settings_are_per_request_and_layer_and_padding_keeps_nothing():
    rng = np.random.default_rng(0)
    routing = route(rng.standard_normal((6, D), np.float32), rng.standard_normal((16, D), np.float32), None, BASE)
    live = settings([parse("topk:2"), parse("layers:1,4")], tiny_model.layers_of(BASE, 2), 4)
    rows, valid = jnp.array([0, 0, 0, 1, 1, 1]), jnp.array([True, True, False, True, False, True])
    kept = [
        select(routing, live, Context(jnp.int32(layer), rows, valid, 0), BASE, 4).keep_NK.sum(axis=1)
        for layer in (0, 1)
    ]
    np.testing.assert_array_equal(kept, [[2, 2, 0, 1, 0, 1], [2, 2, 0, 4, 0, 4]])


def test_full_k_keeps_the_models_own_choice_bit_for_bit():
    rng = np.random.default_rng(5)
    routing = route(rng.standard_normal((N, D), np.float32), rng.standard_normal((16, D), np.float32), None, BASE)
    context = Context(jnp.int32(0), jnp.zeros(N, jnp.int32), jnp.ones(N, bool), 0)
    policy, architecture = [parse("topk:4")], tiny_model.layers_of(BASE, 1)
    narrow, wide = (select(routing, settings(policy, architecture, k), context, BASE, k) for k in (4, 7))
    np.testing.assert_array_equal(narrow.weight_NK, wide.weight_NK[:, :4])
    np.testing.assert_array_equal(narrow.expert_NK, wide.expert_NK[:, :4])


def test_load_loss_is_one_when_even_and_its_gradient_evens_loads():
    moe = dataclasses.replace(BASE, selection_bias=False)
    even = Routing(jnp.zeros((N, 16)), jnp.full((N, 16), 0.25))
    valid = jnp.ones(N, bool)
    np.testing.assert_allclose(balance.load_loss(even, jnp.full(16, 3.0), valid), 1.0, rtol=1e-6)

    def loss(logits):
        routing = Routing(logits, jax.nn.sigmoid(logits))
        return balance.load_loss(routing, jnp.zeros(16).at[3].set(50.0), valid)

    gradient = np.asarray(jax.grad(loss)(jnp.zeros((N, moe.num_experts)))).sum(axis=0)
    assert gradient[3] > 0 and (np.delete(gradient, 3) < 0).all()


def test_bias_moves_toward_even_loads():
    moved = balance.update_bias(jnp.zeros((1, 4)), jnp.array([[10.0, 2.0, 5.0, 3.0]]), 0.1)
    np.testing.assert_allclose(moved, [[-0.1, 0.1, 0.0, 0.1] - np.mean([-0.1, 0.1, 0.0, 0.1])], atol=1e-7)


def test_effective_experts_counts_by_weight():
    """One expert, two equal ones, and weights of 3 to 1: 1, 2 and 16/10 experts; padding does not count."""
    weight = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.75, 0.25, 0.0], [0.4, 0.3, 0.3]])
    slots = Selection(jnp.zeros((4, 3), jnp.int32), weight, weight > 0)
    counted = balance.effective_experts(slots, jnp.array([True, True, True, False]))
    np.testing.assert_allclose(counted, (1 + 2 + 1.6) / 3, rtol=1e-6)
    no_slots = Selection(slots.expert_NK, weight * 0, weight < 0)
    gradient = jax.grad(lambda w: balance.effective_experts(no_slots._replace(weight_NK=w), jnp.ones(4, bool)))(
        weight * 0
    )
    assert np.isfinite(gradient).all()
