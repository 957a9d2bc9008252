"""What policies do with experts: against plain loops on made-up routing, and against the model that is recorded."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.cost.roofline import expected_distinct
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.study import calibrate, expert_use
from moe_jax.study.expert_use import RecordedRouting
from tests import tiny_model
from tests.routing import plain_policies

LAYERS, TOKENS, EXPERTS = 2, 2048, 16


@pytest.fixture(scope="module")
def recorded():
    """Uneven routing: some experts are liked by all."""
    random = np.random.default_rng(0)
    liked = random.normal(size=(LAYERS, 1, EXPERTS))
    mix_LNE = 1 / (1 + np.exp(-liked - random.normal(size=(LAYERS, TOKENS, EXPERTS)))).astype(np.float32)
    return RecordedRouting(mix_LNE + np.float32(0.1) * liked.astype(np.float32), mix_LNE)


def model(num_layers=LAYERS, **moe):
    return tiny_model.changed(
        decoder={"num_layers": num_layers, "num_dense_layers": 0}, moe={"num_experts": EXPERTS, "k": 4, **moe}
    )


def chosen_by_loop(spec, layer, rows):
    """The kept experts of each row of one step."""
    whole = [(score.tolist(), mix.tolist(), 0) for score, mix in rows]
    k = {"topk:2": (2, 2), "layers:3,1": (3, 1)}.get(spec, (4, 4))[layer]
    kept = [plain_policies.topk(score, mix, k) for score, mix, _ in whole]
    if spec.startswith("mass"):
        kept = [plain_policies.mass(slots, 0.6, 1) for slots in kept]
    if spec.startswith("opportunistic"):
        kept = plain_policies.opportunistic(whole, kept, 1)
    if spec.startswith("budget"):
        kept = plain_policies.budget(whole, kept, 6, 1)
    return kept


@pytest.mark.parametrize("spec", ["model", "topk:2", "layers:3,1", "mass:0.6", "opportunistic:1", "budget:6"])
def test_a_policy_keeps_and_touches_what_a_loop_does(recorded, spec):
    """Rows of a step are as far apart in the text as they can be, and each layer has tokens of its own."""
    found = expert_use.demand(parse(spec), recorded, model(), [8, 64])
    assert found.rows == (1, 8, 64)
    for rows in found.rows:
        steps = expert_use.TOKENS // rows
        kept, distinct = 0, 0
        for layer in range(LAYERS):
            for step in range(steps):
                places = [((row * steps + step) * TOKENS // (steps * rows) + layer) % TOKENS for row in range(rows)]
                taken = [(recorded.score_LNE[layer, place], recorded.mix_LNE[layer, place]) for place in places]
                chosen = chosen_by_loop(spec, layer, taken)
                kept += sum(map(len, chosen)) / (steps * rows)
                distinct += len({expert for slots in chosen for expert, _ in slots}) / steps
        np.testing.assert_allclose(found.decode(rows), (rows * kept, distinct), rtol=1e-6)


def test_batch_aware_policies_leave_the_reading_of_prompts_alone(recorded):
    full, aware, few = (
        expert_use.demand(parse(spec), recorded, model(), [8]) for spec in ("model", "opportunistic:1", "topk:2")
    )
    assert aware.prefill(256) == full.prefill(256) and aware.decode(8)[1] < full.decode(8)[1]
    assert full.prefill(100)[0] == pytest.approx(100 * 4 * LAYERS)
    assert few.prefill(100)[0] == pytest.approx(100 * 2 * LAYERS) and few.prefill(4)[1] < full.prefill(4)[1]
    assert full.prefill(10**6)[1] <= EXPERTS * LAYERS


def test_even_routing_touches_as_many_as_the_formula_says():
    score_LNE = np.random.default_rng(0).random((4, 8192, EXPERTS), np.float32)
    even = RecordedRouting(score_LNE, score_LNE)
    for experts, layers in ((EXPERTS, 4), (2 * EXPERTS, 6)):
        served = model(layers, num_experts=experts)
        found = expert_use.demand(MODEL_OWN, even, served, [2, 8, 32])
        for rows in (2, 8, 32):
            kept, distinct = found.decode(rows)
            assert kept == pytest.approx(4 * rows * layers)
            assert distinct / layers == pytest.approx(expected_distinct(experts, 4, rows), rel=0.02)


def test_layers_side_by_side_are_chosen_from_alike(recorded):
    """Even if the scores of one recorded layer are much larger than those of the other."""
    score_LNE = recorded.score_LNE * np.array([1.0, 50.0], np.float32)[:, None, None]
    unlike = RecordedRouting(score_LNE, recorded.mix_LNE)
    routing = expert_use._stand_in(unlike, 0, np.arange(TOKENS), model(1, num_experts=2 * EXPERTS))
    best_NK = np.argsort(-routing.score_NE, axis=1)[:, :4]
    assert 0.4 < (best_NK < EXPERTS).mean() < 0.6


def test_recorded_scores_choose_what_the_model_chooses():
    execution = execution_of(tiny_model.ARCHITECTURE)
    params = tiny_model.random_params()
    tokens_JT = np.random.default_rng(0).integers(0, 300, (2 * calibrate.ROWS, 12), np.int32)
    found = expert_use.record(params, tokens_JT, 5, execution)
    live = policies.settings([MODEL_OWN] * len(tokens_JT), tiny_model.ARCHITECTURE, execution.k_max)
    positions_BT = np.broadcast_to(np.arange(12, dtype=np.int32), tokens_JT.shape)
    rows = (tokens_JT, positions_BT, np.ones_like(positions_BT))
    use = jax.jit(lambda params: decoder.hidden(params, *rows, live, execution)[1])(params)
    chosen_LJTK = np.asarray(use.chosen_NK).reshape(2, len(tokens_JT), 12, -1)[:, :, 5:]
    best_LNK = np.argsort(-found.score_LNE, axis=2, kind="stable")[:, :, : chosen_LJTK.shape[3]]
    np.testing.assert_array_equal(best_LNK, chosen_LJTK.reshape(best_LNK.shape))


def test_a_model_that_the_recording_cannot_stand_in_for_is_refused():
    expert_use.require_stand_in(model(), model(num_experts=2 * EXPERTS))
    for experts in (24, 3 * EXPERTS):
        with pytest.raises(ValueError, match=f"moe.num_experts = {experts}: expected a multiple of the 16 experts"):
            expert_use.require_stand_in(model(), model(num_experts=experts))
    unlike = dataclasses.replace(model().moe, num_experts_of_layers=(16, 8))
    with pytest.raises(ValueError, match="the same number of experts"):
        unlike = dataclasses.replace(model(), moe=unlike)
        expert_use.record(None, np.zeros((8, 4), np.int32), 1, execution_of(unlike))
