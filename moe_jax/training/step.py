"""One training step: gradient, update, balance; compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.config.schema import TrainingConfig
from moe_jax.model import decoder
from moe_jax.routing import balance
from moe_jax.routing.policies import Settings
from moe_jax.training import optimizer, trainable
from moe_jax.training.objective import Measured, Teacher, objective


class State(NamedTuple):
    """All that training carries from step to step."""

    params: decoder.Params  # those that train, without the selection bias
    bias_LE: jax.Array | None  # the selection bias
    optimizer: Any

    def whole(self) -> decoder.Params:
        """The parameters with the selection bias back in its place."""
        return optimizer.with_selection_bias(self.params, self.bias_LE)


class Fixed(NamedTuple):
    """What a step reads and never changes."""

    frozen: decoder.Params  # those that do not train
    teacher: Teacher | None


NOTHING_FIXED = Fixed({}, None)
Step = Callable[[State, Fixed, dict[str, jax.Array], Settings], tuple[State, dict[str, jax.Array]]]


def start(execution: decoder.Execution, training: TrainingConfig, seed: int) -> State:
    """Parameters as drawn from the seed, and an optimizer that has seen nothing."""
    whole = decoder.split(decoder.Decoder(execution.architecture, nnx.Rngs(seed)))
    return state_of(*optimizer.without_selection_bias(whole), training)


def state_of(params: decoder.Params, bias_LE: jax.Array | None, training: TrainingConfig) -> State:
    """The state before the first step."""
    return State(params, bias_LE, optimizer.make_optimizer(training).init(_float32(params)))


def make_step(
    execution: decoder.Execution, training: TrainingConfig, config: ObjectiveConfig, lora_scale: float = 1.0
) -> Step:
    """Compiles nothing yet; returns (state, fixed, batch, live settings) -> (state, metrics). The state is donated.

    A batch of B rows is `training.accumulation` parts of as many, whose gradients are averaged; the settings are those
    of one part. Metrics are float32 scalars: the terms of the objective before they are weighted ("loss": nats per
    token), "gradient_norm" before clipping, and "load_max_over_mean" of the worst MoE layer.
    """
    update_rule = optimizer.make_optimizer(training)

    def gradient_of(state: State, fixed: Fixed, batch, live) -> tuple[Measured, decoder.Params]:
        def loss(params):
            joined = trainable.join(params, fixed.frozen, lora_scale)
            whole = optimizer.with_selection_bias(joined, state.bias_LE)
            return objective(
                whole, batch, live, execution, config, training.balance_loss, fixed.teacher, training.remat
            )

        (_, measured), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return measured, _float32(gradient)

    def accumulated(state: State, fixed: Fixed, batch, live) -> tuple[Measured, decoder.Params]:
        count = training.accumulation
        parts = jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient_of(state, fixed, part, live)), None

        first = jax.tree.map(lambda rows: rows[0], parts)
        nothing = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(gradient_of, state, fixed, first, live)
        )
        (measured, gradient), _ = lax.scan(add, nothing, parts)
        mean = jax.tree.map(lambda total: total / count, (measured.terms, gradient))
        return Measured(mean[0], measured.load_LE), mean[1]

    def step(state: State, fixed: Fixed, batch: dict[str, jax.Array], live: Settings):
        of = gradient_of if training.accumulation == 1 else accumulated
        measured, gradient = of(state, fixed, batch, live)
        updates, optimizer_state = update_rule.update(gradient, state.optimizer, _float32(state.params))
        load_LE = measured.load_LE.astype(jnp.float32)
        bias_LE = state.bias_LE
        if bias_LE is not None and training.balance_bias_rate:
            bias_LE = balance.update_bias(bias_LE, load_LE, training.balance_bias_rate)
        metrics = measured.terms | {
            "gradient_norm": optax.tree.norm(gradient),
            "load_max_over_mean": (load_LE.max(axis=1) / load_LE.mean(axis=1)).max(),
        }
        params = optimizer.apply_updates(state.params, updates, optimizer.steps_done(state.optimizer))
        return State(params, bias_LE, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)


def _float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
