"""Which parameters train, which stay bit-identical, and LoRA against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint.huggingface import flattened
from moe_jax.config.finetuning import FinetuneConfig, ObjectiveConfig
from moe_jax.config.schema import TrainingConfig
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import mask, policies
from moe_jax.routing.policies.parse import parse
from moe_jax.training import trainable
from moe_jax.training.optimizer import with_selection_bias, without_selection_bias
from moe_jax.training.step import Fixed, make_step, state_of
from tests import family_variants
from tests.tiny_model import ARCHITECTURE, random_params

ROWS, LENGTH = 2, 16
TRAINING = TrainingConfig(
    steps=10,
    batch_size=ROWS,
    sequence_length=LENGTH,
    learning_rate=1e-2,
    warmup_steps=0,
    balance_bias_rate=0.0,
    balance_loss=0.0,
)
FAST_AND_BALANCED = dataclasses.replace(TRAINING, learning_rate=5e-2, balance_bias_rate=1e-2)
LATENT = family_variants.VARIANTS["deepseek_v2"]


def batch_of(architecture, rows=ROWS):
    tokens = np.random.default_rng(3).integers(0, architecture.decoder.vocab_size, (rows, LENGTH + 1), np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH))
    return {
        "tokens_BT": tokens[:, :-1],
        "labels_BT": tokens[:, 1:],
        "segments_BT": np.ones_like(places),
        "positions_BT": places,
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def start(params, config, training):
    """The state before the first step, and the frozen parameters."""
    without, biases = without_selection_bias(params)
    parts, frozen = trainable.divide(without, config, training.weights, seed=0)
    return state_of(parts, biases, training), frozen


@jax.jit
def hidden(params, live):
    execution, batch = execution_of(ARCHITECTURE), batch_of(ARCHITECTURE)
    rows = batch["tokens_BT"], batch["positions_BT"], batch["segments_BT"]
    return decoder.hidden(params, *rows, live, execution)


@functools.cache
def trained(config, steps=1, training=TRAINING, latent=False):
    """The model before and after some steps, and the state; the tests share compiled steps."""
    architecture = LATENT.architecture if latent else ARCHITECTURE
    params = family_variants.random_params(LATENT) if latent else random_params()
    before = jax.tree.map(lambda leaf: jnp.asarray(leaf, training.weights), params)
    scale = config.lora_alpha / config.lora_rank
    execution = execution_of(architecture)
    live = policies.settings([parse("topk:3")] * ROWS, architecture, execution.k_max)
    step = make_step(execution, training, ObjectiveConfig(), scale)
    state, frozen = start(before, config, training)
    for _ in range(steps):
        state, _ = step(state, Fixed(frozen, None), batch_of(architecture, ROWS * training.accumulation), live)
    after = trainable.merge_all(state.params, frozen, scale)
    return dict(flattened(without_selection_bias(before)[0])), dict(flattened(after)), state


ALL, LORA = FinetuneConfig(mask=True), FinetuneConfig(train="lora", lora_rank=2, mask=True)
MASK = "moe/router/mask_LE"


def changed(before, after):
    after = {name: leaf for name, leaf in after.items() if name != MASK}
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_all_trains_everything():
    before, after, _ = trained(ALL)
    assert changed(before, after) == set(before)


@pytest.mark.parametrize("train", ["router", "router_and_norms"])
def test_frozen_parameters_stay_bit_identical(train):
    before, after, _ = trained(FinetuneConfig(train=train))
    expected = {name for name in before if "router" in name or (train == "router_and_norms" and "norm" in name)}
    assert changed(before, after) == expected and expected


@pytest.mark.parametrize("latent", [False, True], ids=["grouped", "latent"])
def test_lora_trains_the_matrices_of_attention_and_experts_alone(latent):
    before, after, state = trained(LORA, latent=latent)
    expected = {
        name
        for name in before
        if any(module in name.split("/") for module in ("attention", "experts", "shared"))
        and "norm" not in name
        and "bias" not in name
    }
    assert changed(before, after) == expected and {"moe/experts/gate_up_LEIFD", "moe/experts/down_LEDF"} < expected
    assert state.params["moe"]["experts"].keys() == {"gate_up_LEIFD", "down_LEDF"}


def test_lora_reaches_every_routed_expert_that_a_token_went_to():
    *_, state = trained(LORA)
    _, use = hidden(random_params(), policies.settings([parse("topk:3")] * ROWS, ARCHITECTURE, 8))
    for name in ("gate_up_LEIFD", "down_LEDF"):
        up = np.asarray(state.params["moe"]["experts"][name]["up"])
        moved_LE = np.abs(up.reshape(*up.shape[:2], -1)).max(axis=2) > 0
        np.testing.assert_array_equal(moved_LE, np.asarray(use.load_E) > 0)
    assert 0 < moved_LE.sum() < moved_LE.size


def test_lora_starts_as_the_model_itself():
    state, frozen = start(random_params(), FinetuneConfig(train="lora"), TRAINING)
    whole = trainable.merge_all(state.params, frozen, 2.0)
    assert changed(dict(flattened(without_selection_bias(random_params())[0])), dict(flattened(whole))) == set()


def test_merged_lora_equals_lora_applied_to_activations():
    """Against the definition, W x + scale * B (A x), matrix by matrix, in float64."""
    random, params = np.random.default_rng(0), random_params()
    state, frozen = start(params, FinetuneConfig(train="lora"), TRAINING)
    parts = jax.tree.map(
        lambda leaf: np.asarray(leaf) + random.standard_normal(leaf.shape).astype(np.float32) / 10, state.params
    )
    merged = trainable.merge_all(parts, frozen, 1.7)

    def check(weight, part, whole, num_inputs):
        inputs = weight.shape[-num_inputs:]
        x = random.standard_normal(inputs)
        axes = tuple(range(-num_inputs, 0))
        through = np.tensordot(np.asarray(part["down"], np.float64), x, (axes, axes))  # [.., R]
        up = np.asarray(part["up"], np.float64)
        through = through.reshape(*through.shape[:-1], *(1,) * (up.ndim - through.ndim), through.shape[-1])
        expected = np.tensordot(np.asarray(weight, np.float64), x, (axes, axes)) + 1.7 * (up * through).sum(-1)
        np.testing.assert_allclose(np.tensordot(np.asarray(whole, np.float64), x, (axes, axes)), expected, atol=1e-5)

    experts = params["moe"]["experts"]
    for name, num_inputs in {"gate_up_LEIFD": 1, "down_LEDF": 1}.items():
        check(experts[name], parts["moe"]["experts"][name], merged["moe"]["experts"][name], num_inputs)
    attention = params["moe"]["attention"]
    for name, num_inputs in {"query_LHAD": 1, "key_LGAD": 1, "value_LGAD": 1, "output_LDHA": 2}.items():
        check(attention[name], parts["moe"]["attention"][name], merged["moe"]["attention"][name], num_inputs)


def test_hidden_reads_unmerged_lora_as_the_merged_model():
    state, frozen = start(random_params(), FinetuneConfig(train="lora"), TRAINING)
    parts = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.05), state.params)
    live = policies.settings([parse("topk:4")] * ROWS, ARCHITECTURE, 8)
    joined, merged = (whole(parts, frozen, 2.0) for whole in (trainable.join, trainable.merge_all))
    found = [hidden(with_selection_bias(params, state.biases), live)[0] for params in (joined, merged)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_gradients_accumulate_to_those_of_one_batch():
    twice, execution = dataclasses.replace(TRAINING, accumulation=2), execution_of(ARCHITECTURE)
    found = []
    for training, rows in ((dataclasses.replace(TRAINING, batch_size=2 * ROWS), 2 * ROWS), (twice, ROWS)):
        live = policies.settings([parse("topk:3")] * rows, ARCHITECTURE, execution.k_max)
        step = make_step(execution, training, ObjectiveConfig())
        state, frozen = start(random_params(), FinetuneConfig(), training)
        _, metrics = step(state, Fixed(frozen, None), batch_of(ARCHITECTURE, 2 * ROWS), live)
        found.append(metrics)
    for name in ("loss", "gradient_norm", "load_max_over_mean"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)


def test_weights_in_bfloat16_have_float32_moments_and_move_by_less_than_their_last_bit():
    """Updates of a tenth of the last bit, which rounding to nearest would lose."""
    training = dataclasses.replace(TRAINING, weights="bfloat16", learning_rate=2e-5, weight_decay=0.0, steps=100000)
    before, after, state = trained(FinetuneConfig(), steps=20, training=training)
    adam = state.optimizer[1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(jnp.float32)}
    assert state.params["embedding_VD"].dtype == jnp.bfloat16 and state.params["norm_D"].dtype == jnp.float32
    name = "moe/attention/query_LHAD"
    moved = np.asarray(after[name], np.float64) - np.asarray(before[name], np.float64)
    assert 0.02 < (moved != 0).mean() < 0.9
    direction = -np.sign(np.asarray(adam.mu["moe"]["attention"]["query_LHAD"], np.float64))
    assert (moved * direction).sum() > 0.5 * 20 * 2e-5 * moved.size * 0.5


def test_the_selection_bias_moves_only_with_balancing():
    bias_LE = random_params()["moe"]["router"]["bias_LE"]
    *_, state = trained(ALL)
    assert np.array_equal(state.biases["moe"], bias_LE)
    *_, state = trained(ALL, steps=10, training=FAST_AND_BALANCED)
    assert not np.array_equal(state.biases["moe"], bias_LE)


@pytest.mark.parametrize("config", [ALL, LORA], ids=["all", "lora"])
def test_a_mask_trains_along_with_other_parameters(config):
    _, after, state = trained(config)
    mask_LE = np.asarray(state.params["moe"]["router"]["mask_LE"])
    assert mask_LE.shape == (2, 16) and (mask_LE != mask.START).any() and MASK in after


def test_some_steps_mask_experts_and_keep_others():
    *_, state = trained(ALL, steps=10, training=FAST_AND_BALANCED)
    mask_LE = np.asarray(state.params["moe"]["router"]["mask_LE"])
    assert (mask_LE <= 0).any() and (mask_LE > 0).any()
