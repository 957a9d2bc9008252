"""The decoder against a loop over all experts, against itself without a cache, and without other rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.contract import Dispatch
from moe_jax.engine import cache as caches
from moe_jax.model import decoder
from moe_jax.model.moe import moe_layer
from moe_jax.routing import policies
from moe_jax.routing.policies import Context
from moe_jax.routing.policies.parse import parse
from tests import tiny_model

UNTIED = tiny_model.changed(decoder={"tie_embeddings": False})
PARAMS = tiny_model.random_params(UNTIED)
EXECUTION = decoder.Execution(UNTIED, 8, tiny_model.KERNELS)
TOLERANCE = 1e-5  # of the largest value, float32


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def live(*k):
    """Settings with one row per given k, the same in both MoE layers."""
    return policies.settings([parse(f"topk:{one}") for one in k], UNTIED, 8)


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 512, (batch, length), dtype=np.int32)


@jax.jit
def score(params, tokens_BT, positions_BT, segments_BT, settings):
    x_BTD, use = decoder.hidden(params, tokens_BT, positions_BT, segments_BT, settings, EXECUTION)
    return decoder.logits(params, x_BTD), use.load_E


def whole(tokens_BT, settings, segments_BT=None):
    """Logits without a cache; positions start at 0."""
    positions_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
    segments_BT = np.ones_like(tokens_BT) if segments_BT is None else segments_BT
    return score(PARAMS, tokens_BT, positions_BT, segments_BT, settings)


@jax.jit
def extend(params, cache, tokens_BT, start_B, valid_BT, settings):
    x_BTD, cache, use = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, settings, EXECUTION)
    return decoder.logits(params, x_BTD), cache, use.load_E


def reference_moe(x_ND, weights, moe, k_N):
    """One token at a time in float64: every expert runs, with weight zero if it is not chosen."""

    def silu(x):
        return x / (1 + np.exp(-x))

    def feed_forward(x_D, gate_up_IFD, down_DF):
        return down_DF @ (silu(gate_up_IFD[0] @ x_D) * (gate_up_IFD[1] @ x_D))

    weights = jax.tree.map(lambda weight: np.asarray(weight, np.float64), weights)
    y_ND, chosen = [], []
    for x_D, k in zip(np.asarray(x_ND, np.float64), k_N):
        logits_E = weights["router"]["weight_ED"] @ x_D
        if moe.score == "softmax":
            mix_E = np.exp(logits_E - logits_E.max())
            mix_E = mix_E / mix_E.sum()
        else:
            mix_E = 1 / (1 + np.exp(-logits_E))
        score_E = mix_E + weights["router"].get("bias_E", 0)
        group_of_E = np.arange(moe.num_experts) // (moe.num_experts // moe.num_groups)
        if moe.num_groups > 1:
            counted = 1 if moe.group_score == "best" else 2
            worth = [np.sort(score_E[group_of_E == group])[-counted:].sum() for group in range(moe.num_groups)]
            best = np.argsort(worth)[-moe.num_groups_kept :]
            score_E = np.where(np.isin(group_of_E, best), score_E, -np.inf)
        kept = np.argsort(-score_E, kind="stable")[:k]
        weight_E = np.zeros(moe.num_experts)
        weight_E[kept] = mix_E[kept]
        if moe.normalize and k:
            weight_E = weight_E / weight_E.sum()
        y_D = np.zeros_like(x_D)
        for expert in range(moe.num_experts):
            y_expert_D = feed_forward(x_D, weights["gate_up_EIFD"][expert], weights["down_EDF"][expert])
            y_D = y_D + moe.routed_scaling * weight_E[expert] * y_expert_D
        if moe.num_shared_experts:
            shared_D = feed_forward(x_D, weights["shared"]["gate_up_IFD"], weights["shared"]["down_DF"])
            gate = 1 / (1 + np.exp(-weights["shared_gate_D"] @ x_D)) if moe.shared_gate else 1.0
            y_D = y_D + gate * shared_D
        y_ND.append(y_D)
        chosen.extend(kept)
    return np.stack(y_ND), np.bincount(chosen, minlength=moe.num_experts)


VARIANTS = {
    "sigmoid": {},
    "softmax": {"score": "softmax", "selection_bias": False},
    "softmax_bias": {"score": "softmax", "num_shared_experts": 2},
    "no_bias": {"selection_bias": False},
    "not_normalized": {"normalize": False},
    "softmax_not_normalized_scaled": {
        "score": "softmax",
        "selection_bias": False,
        "normalize": False,
        "routed_scaling": 2.5,
    },
    "groups": {"num_groups": 4, "num_groups_kept": 2, "routed_scaling": 2.5},
    "groups_of_one": {"num_groups": 16, "num_groups_kept": 8},
    "no_shared": {"num_shared_experts": 0},
    "groups_by_their_best": {"num_groups": 4, "num_groups_kept": 2, "group_score": "best"},
    "gated_shared_of_another_width": {"shared_gate": True, "shared_hidden": 40},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_moe_layer_equals_a_loop_over_all_experts(variant):
    moe = tiny_model.changed(moe=VARIANTS[variant]).moe
    stack = tiny_model.random_params(tiny_model.changed(moe=VARIANTS[variant]))["moe"]
    layer = 1
    experts = stack["experts"]
    parts = {name: stack[name] for name in ("router", "shared") if name in stack}
    weights = {
        part: {name.replace("_L", "_"): weight[layer] for name, weight in weights.items()}
        for part, weights in parts.items()
    }
    if moe.shared_gate:
        weights["shared_gate_D"] = stack["shared_gate_LD"][layer]
    x_ND = np.random.default_rng(1).standard_normal((12, 64)).astype(np.float32)
    row_N = np.repeat(np.arange(4), 3).astype(np.int32)
    valid_N = np.ones(12, bool)
    valid_N[[4, 9]] = False
    k_B = np.array([8, 1, 3, 5])
    architecture = tiny_model.changed(moe=VARIANTS[variant])
    settings = policies.settings([parse(f"layers:2,{k}") for k in k_B], architecture, 8)  # another k in the other layer

    @jax.jit
    def run(x_ND, weights, experts, settings):
        context = Context(jnp.int32(layer), row_N, valid_N, 3)
        kernel = tiny_model.KERNELS.grouped_matmul
        return moe_layer(x_ND, weights, experts, jnp.int32(layer), settings, context, moe, 8, kernel, Dispatch())

    y_ND, use = run(x_ND, weights, experts, settings)
    weights |= {"gate_up_EIFD": experts["gate_up_LEIFD"][layer], "down_EDF": experts["down_LEDF"][layer]}
    expected_ND, load_E = reference_moe(x_ND, weights, moe, np.where(valid_N, k_B[row_N], 0))
    assert_close(y_ND, expected_ND)
    np.testing.assert_array_equal(use.load_E, load_E)


def test_cached_decode_equals_the_whole_sequence():
    """A ragged batch with a policy per row: prompts first, then one token at a time."""
    tokens_BT, length_B, settings = tokens(4, 16), np.array([8, 2, 5, 7], np.int32), live(8, 2, 5, 1)
    expected_BTV, _ = whole(tokens_BT, settings)
    valid_BT = np.arange(8)[None, :] < length_B[:, None]
    prompts_BT = np.where(valid_BT, tokens_BT[:, :8], 511)
    cache = caches.allocate(UNTIED, 4, 16, jnp.float32)
    logits_BTV, cache, _ = extend(PARAMS, cache, prompts_BT, np.zeros(4, np.int32), valid_BT, settings)
    for row, length in enumerate(length_B):
        assert_close(logits_BTV[row, :length], expected_BTV[row, :length])
    rows, alive_BT = np.arange(4), np.ones((4, 1), bool)
    for at_B in (length_B + step for step in range(8)):
        logits_BTV, cache, _ = extend(PARAMS, cache, tokens_BT[rows, at_B][:, None], at_B, alive_BT, settings)
        assert_close(logits_BTV[:, 0], expected_BTV[rows, at_B])


def test_a_finished_row_keeps_no_experts_and_affects_no_other():
    prompts_BT, settings = tokens(4, 8), live(8, 4, 2, 1)
    cache = caches.allocate(UNTIED, 4, 16, jnp.float32)
    start_B, everything = np.zeros(4, np.int32), np.ones((4, 8), bool)
    _, cache, load_LE = extend(PARAMS, cache, prompts_BT, start_B, everything, settings)
    assert load_LE.sum(axis=1).tolist() == [8 * (8 + 4 + 2 + 1)] * 2
    last_BT, start_B = np.array([[7], [8], [9], [7]], np.int32), np.full(4, 8, np.int32)
    all_BTV, _, load_LE = extend(PARAMS, cache, last_BT, start_B, np.ones((4, 1), bool), settings)
    assert load_LE.sum(axis=1).tolist() == [15, 15]
    alive_BT = np.array([[False], [True], [False], [True]])
    some_BTV, _, load_LE = extend(PARAMS, cache, last_BT, start_B, alive_BT, settings)
    assert load_LE.sum(axis=1).tolist() == [5, 5]
    assert_close(some_BTV[alive_BT], all_BTV[alive_BT])


def test_requests_of_different_k_get_the_same_alone_and_together():
    tokens_BT, settings = tokens(4, 16), live(2, 8, 3, 5)
    together_BTV, load_LE = whole(tokens_BT, settings)
    assert load_LE.sum(axis=1).tolist() == [16 * (2 + 8 + 3 + 5)] * 2
    for row, k in ((0, 2), (1, 8)):
        segments_BT = np.zeros_like(tokens_BT)
        segments_BT[row] = 1
        alone_BTV, load_LE = whole(tokens_BT, settings, segments_BT)
        assert load_LE.sum(axis=1).tolist() == [16 * k] * 2
        assert_close(together_BTV[row], alone_BTV[row])
    all_experts_BTV, _ = whole(tokens_BT, live(8, 8, 8, 8))
    assert np.abs(all_experts_BTV - together_BTV)[0].max() > 0.1  # k makes a difference


def test_a_rows_logits_depend_on_neither_padding_nor_other_rows():
    tokens_BT = tokens(1, 11)
    expected_BTV, _ = whole(tokens_BT, live(8))
    for seed in (1, 2):
        crowd_BT = tokens(4, 16, seed)
        crowd_BT[2, :11] = tokens_BT
        segments_BT = np.ones_like(crowd_BT)
        segments_BT[2, 11:] = 0
        got_BTV, _ = whole(crowd_BT, live(3, 8, 8, 1), segments_BT)
        assert_close(got_BTV[2, :11], expected_BTV[0])


def test_segments_do_not_see_each_other():
    """Row 0 holds two documents; rows 1 and 2 hold one of them each."""
    tokens_BT, segments_BT = tokens(4, 16), np.zeros((4, 16), np.int32)
    tokens_BT[1, :6], tokens_BT[2, :10] = tokens_BT[0, :6], tokens_BT[0, 6:]
    segments_BT[0, :6], segments_BT[0, 6:], segments_BT[1, :6], segments_BT[2, :10] = 1, 2, 1, 1
    positions_BT = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    positions_BT[0, 6:] = np.arange(10)
    logits_BTV, _ = score(PARAMS, tokens_BT, positions_BT, segments_BT, live(8, 8, 8, 8))
    assert_close(logits_BTV[0, :6], logits_BTV[1, :6])
    assert_close(logits_BTV[0, 6:], logits_BTV[2, :10])


def test_causality_by_gradient():
    """Each position has a different token: the gradient of its embedding shows which positions saw it."""
    tokens_BT, at = np.arange(100, 112, dtype=np.int32)[None], 5

    @jax.jit
    @jax.grad
    def gradient(embedding_VD):
        ones_BT, positions_BT = jnp.ones_like(tokens_BT), jnp.arange(12, dtype=jnp.int32)[None]
        logits_BTV, _ = score({**PARAMS, "embedding_VD": embedding_VD}, tokens_BT, positions_BT, ones_BT, live(4))
        return (logits_BTV[0, at] ** 2).sum()

    size_T = np.abs(gradient(PARAMS["embedding_VD"])[tokens_BT[0]]).max(axis=1)
    assert (size_T[: at + 1] > 1e-3).all() and (size_T[at + 1 :] == 0).all()
