"""Losses and their gradients against textbook definitions, in plain loops of float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.training import objective
from moe_jax.training.objective import Teacher, token_losses
from tests.tiny_model import ARCHITECTURE, changed, random_params

VOCAB, WIDTH = 31, 6
OBJECTIVES = {
    "language_model": ObjectiveConfig(),
    "forward": ObjectiveConfig(language_model=0.0, distillation=1.0),
    "forward_warm": ObjectiveConfig(language_model=0.5, distillation=2.0, temperature=2.5),
    "reverse": ObjectiveConfig(language_model=0.0, distillation=1.0, direction="reverse"),
    "reverse_warm": ObjectiveConfig(language_model=0.3, distillation=0.7, direction="reverse", temperature=1.5),
}


def share_of(logits, temperature=1.0):
    exp = np.exp(logits / temperature - (logits / temperature).max())
    return exp / exp.sum()


def plain_loss(x, head, label, teacher_x, teacher_head, config):
    """The loss of one token, from its definition."""
    logits, teacher_logits = head @ x, teacher_head @ teacher_x
    own, full = (share_of(logits, config.temperature) for logits in (logits, teacher_logits))
    first, second = (full, own) if config.direction == "forward" else (own, full)
    kl = config.temperature**2 * (first * np.log(first / second)).sum()
    return config.language_model * -np.log(share_of(logits)[label]) + config.distillation * kl


def random_inputs(num_tokens):
    random = np.random.default_rng(0)
    x, teacher_x = random.standard_normal((2, num_tokens, WIDTH), np.float32)
    head, teacher_head = random.standard_normal((2, VOCAB, WIDTH), np.float32)
    return (
        x,
        head,
        random.integers(VOCAB, size=num_tokens),
        random.random(num_tokens, np.float32),
        teacher_x,
        teacher_head,
    )


@pytest.mark.parametrize("num_tokens", [1, 7, 24])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_token_losses(monkeypatch, name, num_tokens):
    """The gradient against finite differences of the definition, in random directions of x and head."""
    monkeypatch.setattr(objective, "CHUNK_TOKENS", 8)
    config = OBJECTIVES[name]
    x, head, labels, weight, teacher_x, teacher_head = random_inputs(num_tokens)
    given = (teacher_x, teacher_head) if config.has_teacher else (None, None)

    def ours(x, head):
        return 3 * token_losses(x, head, labels, weight, *given, config)[0]

    def expected(x, head):
        each = zip(x, labels, weight, teacher_x)
        return 3 * sum(w * plain_loss(row, head, label, other, teacher_head, config) for row, label, w, other in each)

    loss, gradients = jax.value_and_grad(ours, argnums=(0, 1))(x, head)
    x, head = x.astype(np.float64), head.astype(np.float64)
    np.testing.assert_allclose(loss, expected(x, head), rtol=1e-5)
    random, step = np.random.default_rng(1), 1e-5
    for _ in range(4):
        along = random.standard_normal(x.shape), random.standard_normal(head.shape)
        for number in (0, 1):
            ahead, back = ([x, head] for _ in range(2))
            ahead[number] = ahead[number] + step * along[number]
            back[number] = back[number] - step * along[number]
            slope = (expected(*ahead) - expected(*back)) / (2 * step)
            got = (np.asarray(gradients[number], np.float64) * along[number]).sum()
            np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


def test_terms_are_reported_before_they_are_weighted():
    x, head, labels, weight, teacher_x, teacher_head = random_inputs(5)
    config = ObjectiveConfig(language_model=0.25, distillation=4.0)
    total, terms = token_losses(x, head, labels, weight, teacher_x, teacher_head, config)
    np.testing.assert_allclose(total, 0.25 * terms["loss"] + 4 * terms["divergence"], rtol=1e-6)
    alone, _ = token_losses(x, head, labels, weight, None, None, ObjectiveConfig())
    np.testing.assert_allclose(terms["loss"], alone, rtol=1e-6)


def test_logits_are_never_in_memory_at_once():
    """No array of the compiled loss is as large as all logits together."""
    num_tokens, d_model, vocab = 8192, 16, 4096
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_tokens, d_model), (vocab, d_model))]
    labels, weight = jax.ShapeDtypeStruct((num_tokens,), jnp.int32), jax.ShapeDtypeStruct((num_tokens,), jnp.float32)

    def loss(x, head, teacher_x, teacher_head, labels, weight):
        return token_losses(x, head, labels, weight, teacher_x, teacher_head, ObjectiveConfig(distillation=1.0))[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, *shapes, labels, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < num_tokens * vocab * 4 / 2


ROWS, LENGTH = 3, 24


def batch_of(seed=0):
    """Packed rows: two segments, the second of the last row padding."""
    tokens_BT = np.random.default_rng(seed).integers(0, ARCHITECTURE.decoder.vocab_size, (ROWS, LENGTH + 1), np.int32)
    segments_BT = np.broadcast_to(np.where(np.arange(LENGTH) < 15, 1, 2), (ROWS, LENGTH)).astype(np.int32).copy()
    segments_BT[-1, 15:] = 0
    positions_BT = np.broadcast_to(
        np.where(np.arange(LENGTH) < 15, np.arange(LENGTH), np.arange(LENGTH) - 15), (ROWS, LENGTH)
    )
    rows = {"tokens_BT": tokens_BT[:, :-1], "labels_BT": tokens_BT[:, 1:], "segments_BT": segments_BT}
    return rows | {"positions_BT": positions_BT.astype(np.int32)}


EXECUTION = execution_of(ARCHITECTURE)


def live_of(policy):
    return policies.settings([policy] * ROWS, ARCHITECTURE, EXECUTION.k_max)


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def differentiated(params, teacher, live, batch, config, remat):
    def loss(params):
        return objective.objective(params, batch, live, EXECUTION, config, 0.0, teacher, remat)

    return jax.value_and_grad(loss, has_aux=True)(params)


def gradient_under(spec, config, params, teacher_params=None, remat=False):
    teacher_params = params if teacher_params is None else teacher_params
    teacher = Teacher(teacher_params, live_of(MODEL_OWN), EXECUTION) if config.has_teacher else None
    (total, measured), gradient = differentiated(params, teacher, live_of(parse(spec)), batch_of(), config, remat)
    return float(total), measured, gradient


def norm(tree):
    return np.sqrt(sum((np.float32(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distilling_a_model_from_itself_at_its_own_k_changes_nothing(direction):
    config = ObjectiveConfig(language_model=0.0, distillation=1.0, hidden=1.0, direction=direction)
    total, measured, gradient = gradient_under("topk:8", config, random_params())
    assert abs(total) <= 1e-6 and norm(gradient) <= 1e-6
    total, measured, gradient = gradient_under("topk:3", config, random_params())
    assert total > 1e-3 and norm(gradient) > 1e-3
    assert float(measured.terms["divergence"]) > 1e-4 and float(measured.terms["hidden_distance"]) > 1e-3


def test_padding_and_the_teacher_get_no_gradient():
    config = ObjectiveConfig(language_model=1.0, distillation=1.0)
    params, other = random_params(), random_params(seed=1)
    live = live_of(parse("topk:3"))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, other, batch):
        return objective.objective(params, batch, live, EXECUTION, config, 0.0, Teacher(other, live, EXECUTION))[0]

    total, (gradient, teacher_gradient) = loss(params, other, batch_of())
    assert norm(teacher_gradient) == 0 and norm(gradient) > 0
    changed = batch_of()
    changed["labels_BT"] = np.where(changed["segments_BT"] == 0, 7, changed["labels_BT"])
    assert loss(params, other, changed)[0] == total


def test_a_teacher_of_another_shape_runs_as_itself():
    """Another width, depth and number of experts; the divergence is from its own logits."""
    shape = changed(decoder={"d_model": 48, "num_layers": 2}, moe={"num_experts": 12, "k": 3})
    other, execution, batch = random_params(shape, seed=2), execution_of(shape), batch_of()
    config = ObjectiveConfig(language_model=0.0, distillation=1.0)
    teacher = Teacher(other, policies.settings([MODEL_OWN] * ROWS, shape, execution.k_max), execution)
    params = random_params()
    (total, _), _ = differentiated(params, teacher, live_of(parse("topk:8")), batch, config, False)

    def log_probabilities(params, execution):
        live = policies.settings([MODEL_OWN] * ROWS, execution.architecture, execution.k_max)
        rows = batch["tokens_BT"], batch["positions_BT"], batch["segments_BT"]
        x_BTD, _ = decoder.hidden(params, *rows, live, execution)
        return np.float64(jax.nn.log_softmax(decoder.logits(params, x_BTD)))[batch["segments_BT"] > 0]

    own_NV, full_NV = log_probabilities(params, EXECUTION), log_probabilities(other, execution)
    expected = (np.exp(full_NV) * (full_NV - own_NV)).sum(axis=1).mean()
    assert expected > 0.1 and float(total) == pytest.approx(expected, rel=1e-4)


def test_hidden_distance_is_relative_and_squared():
    params, other = random_params(), random_params(seed=1)
    config = ObjectiveConfig(language_model=0.0, hidden=1.0)
    total, measured, _ = gradient_under("topk:8", config, params, other)
    doubled = other | {"norm_D": 2 * other["norm_D"]}
    far, _, _ = gradient_under("topk:8", config, params, doubled)
    assert total == float(measured.terms["hidden_distance"]) > 0.5  # unrelated models
    assert far != total


def test_the_sparsity_term_lowers_the_experts_that_a_token_uses():
    """One step along the gradient of the term alone, and the value for known weights."""
    config = ObjectiveConfig(language_model=1e-9, sparsity=1.0)
    params = random_params()
    total, measured, gradient = gradient_under("topk:8", config, params)
    assert 1 < float(measured.terms["effective_experts"]) < 8
    assert norm(gradient["moe"]["router"]["weight_LED"]) > 0
    moved = jax.tree.map(lambda param, slope: param - np.float32(0.05) * slope, params, jax.device_get(gradient))
    assert gradient_under("topk:8", config, moved)[0] < total


def test_remat_gives_the_same_gradient():
    config = ObjectiveConfig(distillation=0.5)
    plain, again = (gradient_under("topk:3", config, random_params(), remat=remat) for remat in (False, True))
    assert plain[0] == pytest.approx(again[0], rel=1e-6)
    for one, other in zip(jax.tree.leaves(plain[2]), jax.tree.leaves(again[2])):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_in_bfloat16_keep_their_dtype_and_direction():
    config = ObjectiveConfig(distillation=0.5)
    exact = gradient_under("topk:3", config, random_params())[2]
    rough = gradient_under("topk:3", config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params()))[2]
    flat = [
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (exact, rough)
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype(jnp.bfloat16)}
    assert flat[0] @ flat[1] > 0.98 * np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])


def test_the_weights_of_the_terms_are_checked():
    for wrong in ({"language_model": 0.0}, {"temperature": 0.0}, {"direction": "sideways"}, {"sparsity": -1.0}):
        with pytest.raises(ValueError, match=f"objective.{next(iter(wrong))}"):
            dataclasses.replace(ObjectiveConfig(), **wrong)
