"""Training of models whose layers differ: every stack is balanced, masked and adapted."""

import dataclasses

import jax
import numpy as np

from moe_jax.config.architecture import Architecture, MoEConfig
from moe_jax.config.finetuning import FinetuneConfig, ObjectiveConfig
from moe_jax.config.schema import TrainingConfig
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import mask, policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.training import trainable
from moe_jax.training.optimizer import with_selection_bias, without_selection_bias
from moe_jax.training.step import Fixed, make_step, state_of
from tests.family_variants import GROUPED, TRUNK
from tests.tiny_model import random_params

EXPERTS_L = (12, 6, 12)
ARCHITECTURE = Architecture(
    dataclasses.replace(TRUNK, num_layers=4, num_dense_layers=1, dense_layers=(1,)),
    GROUPED,
    MoEConfig(num_experts=12, k=4, expert_hidden=8, num_experts_of_layers=EXPERTS_L),
)
RATE, ROWS, LENGTH = 1e-2, 4, 12
COLUMNS = {"moe": [0, 2], "moe_6": [1]}


def test_a_step_balances_and_adapts_every_stack():
    params = random_params(ARCHITECTURE)
    without, biases = without_selection_bias(params)
    assert {stack: bias_LE.shape for stack, bias_LE in biases.items()} == {"moe": (2, 12), "moe_6": (1, 6)}
    tokens_BT = np.random.default_rng(0).integers(2, TRUNK.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
    ones_BT = np.ones_like(tokens_BT)
    execution = execution_of(ARCHITECTURE)
    live = policies.settings([MODEL_OWN] * ROWS, ARCHITECTURE, execution.k_max)
    hidden = jax.jit(lambda params: decoder.hidden(params, tokens_BT, positions_BT, ones_BT, live, execution))
    before, use = hidden(params)
    load_LE = np.asarray(use.load_E, np.float64)

    config = FinetuneConfig(train="lora", lora_rank=2, mask=True)
    parts, frozen = jax.jit(lambda without: trainable.divide(without, config, "float32", seed=0))(without)
    assert {stack: parts[stack]["router"]["mask_LE"].shape for stack in COLUMNS} == {"moe": (2, 12), "moe_6": (1, 6)}
    training = TrainingConfig(steps=2, warmup_steps=0, learning_rate=1e-2, balance_bias_rate=RATE, batch_size=ROWS)
    batch = {"tokens_BT": tokens_BT, "labels_BT": np.roll(tokens_BT, -1, 1), "segments_BT": ones_BT}
    batch["positions_BT"] = positions_BT
    state = jax.jit(state_of, static_argnums=2)(parts, biases, training)
    state, metrics = make_step(execution, training, ObjectiveConfig())(state, Fixed(frozen, None), batch, live)
    for stack, columns in COLUMNS.items():
        bias_LE, own_LE = np.asarray(biases[stack], np.float64), load_LE[columns][:, : biases[stack].shape[1]]
        moved_LE = bias_LE + RATE * np.sign(own_LE.mean(axis=1, keepdims=True) - own_LE)
        expected_LE = moved_LE - moved_LE.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(state.biases[stack], expected_LE, atol=1e-6)
        assert np.any(state.params[stack]["experts"]["down_LEDF"]["up"])
    worst = max(load_E[:count].max() / load_E[:count].mean() for load_E, count in zip(load_LE, EXPERTS_L, strict=True))
    np.testing.assert_allclose(metrics["load_max_over_mean"], worst, rtol=1e-5)

    whole = with_selection_bias(trainable.merge_all(state.params, frozen, 1.0), state.biases)
    for stack in COLUMNS:
        whole[stack]["router"]["mask_LE"] = whole[stack]["router"]["mask_LE"].at[:, 0].set(-1.0)
    merged = mask.merge(whole)
    for stack in COLUMNS:
        assert "mask_LE" not in merged[stack]["router"]
        down_LEDF = np.asarray(merged[stack]["experts"]["down_LEDF"])
        assert not down_LEDF[:, 0].any() and down_LEDF[:, 1:].any(axis=(2, 3)).all()
    assert np.any(hidden(merged)[0] != before)
