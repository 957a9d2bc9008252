"""One training step: gradient, update, balance; compiled once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config.schema import TrainingConfig
from moe_jax.model import decoder
from moe_jax.routing import balance
from moe_jax.routing.policies.base import Settings
from moe_jax.training import optimizer
from moe_jax.training.objective import objective


class State(NamedTuple):
    """All that training carries from step to step."""

    params: decoder.Params  # without the selection bias
    bias_LE: jax.Array | None  # the selection bias
    optimizer: Any

    def whole(self) -> decoder.Params:
        """The parameters with the selection bias back in its place."""
        return optimizer.with_selection_bias(self.params, self.bias_LE)


class Metrics(NamedTuple):
    """What one step measured; float32 scalars."""

    loss: jax.Array  # nats per token
    load_loss: jax.Array
    gradient_norm: jax.Array  # before clipping
    load_max_over_mean: jax.Array  # of the worst MoE layer


def start(execution: decoder.Execution, training: TrainingConfig, seed: int) -> State:
    """Parameters as drawn from the seed, and an optimizer that has seen nothing."""
    whole = decoder.split(decoder.Decoder(execution.architecture, nnx.Rngs(seed)))
    params, bias_LE = optimizer.without_selection_bias(whole)
    return State(params, bias_LE, optimizer.make_optimizer(training).init(params))


def make_step(execution: decoder.Execution, training: TrainingConfig):
    """Compiles nothing yet; returns (state, batch, live settings) -> (state, metrics). The state is donated."""
    update_rule = optimizer.make_optimizer(training)

    def step(state: State, batch: dict[str, jax.Array], live: Settings) -> tuple[State, Metrics]:
        def loss(params):
            whole = optimizer.with_selection_bias(params, state.bias_LE)
            return objective(whole, batch, live, execution, training.balance_loss)

        (_, measured), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer_state = update_rule.update(gradient, state.optimizer, state.params)
        load_LE = measured.load_LE.astype(jnp.float32)
        bias_LE = state.bias_LE
        if bias_LE is not None:
            bias_LE = balance.update_bias(bias_LE, load_LE, training.balance_bias_rate)
        metrics = Metrics(
            measured.loss,
            measured.load_loss,
            optax.tree.norm(gradient),
            (load_LE.max(axis=1) / load_LE.mean(axis=1)).max(),
        )
        return State(optax.apply_updates(state.params, updates), bias_LE, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)
