"""One training step: gradient, optimizer update, load balancing; compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture
from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.config.schema import TrainingConfig
from moe_jax.model import decoder
from moe_jax.model.sharding import constrained, of_tree, on_all, whole
from moe_jax.routing import balance
from moe_jax.routing.policies import Settings
from moe_jax.training import optimizer, trainable
from moe_jax.training.objective import BatchMetrics, Teacher, objective


class State(NamedTuple):
    """What a training step updates."""

    params: decoder.Params  # the trained parameters, without the selection bias
    biases: dict[str, jax.Array]  # stack name -> selection bias bias_LE, for each stack that has one
    optimizer: Any

    def all_params(self) -> decoder.Params:
        """The parameters, selection bias included."""
        return optimizer.with_selection_bias(self.params, self.biases)


class Fixed(NamedTuple):
    """What a step reads and does not change."""

    frozen: decoder.Params  # parameters that do not train
    teacher: Teacher | None


NOTHING_FIXED = Fixed({}, None)
Step = Callable[[State, Fixed, dict[str, jax.Array], Settings], tuple[State, dict[str, jax.Array]]]


def start(execution: decoder.Execution, training: TrainingConfig, seed: int) -> State:
    """The initial state: random parameters from the seed, and a fresh optimizer."""

    def make() -> State:
        params = decoder.split(decoder.Decoder(execution.architecture, nnx.Rngs(seed)))
        return state_of(*optimizer.without_selection_bias(params), training)

    if execution.layout is None:
        return make()
    return jax.jit(make, out_shardings=of_tree(jax.eval_shape(make), execution.layout))()


def state_of(params: decoder.Params, biases: dict[str, jax.Array], training: TrainingConfig) -> State:
    """The state before the first step, from given parameters."""
    return State(params, biases, optimizer.make_optimizer(training).init(_float32(params)))


def make_step(
    execution: decoder.Execution, training: TrainingConfig, config: ObjectiveConfig, lora_scale: float = 1.0
) -> Step:
    """Returns the step, as `make_program` has it; on a mesh, batch and live settings may be arrays of the host."""
    program, layout = make_program(execution, training, config, lora_scale), execution.layout
    if layout is None:
        return program
    return lambda state, fixed, batch, live: program(state, fixed, *on_all((batch, live), layout))


def make_program(
    execution: decoder.Execution, training: TrainingConfig, config: ObjectiveConfig, lora_scale: float = 1.0
) -> Step:
    """Returns the jitted step (state, fixed, batch, live settings) -> (state, metrics). The state is donated.

    The rows of a batch are split into `training.accumulation` equal parts, whose gradients are averaged; `live` has the
    rows of one part. Metrics are float32 scalars: the terms of the objective before weighting ("loss": nats per
    token), "gradient_norm" before clipping, "load_max_over_mean" of the most uneven MoE layer, and, where slots may be
    dropped, their number, "overflow_slots".
    """
    update_rule, architecture = optimizer.make_optimizer(training), execution.architecture
    num_experts_L, layout = np.array(architecture.num_experts_L, np.float32), execution.layout

    def gradient_of(state: State, fixed: Fixed, batch, live) -> tuple[BatchMetrics, decoder.Params]:
        batch = {name: constrained(rows, "BT", layout) for name, rows in batch.items()}

        def loss(params):
            joined = trainable.join(params, fixed.frozen, lora_scale)
            all_params = optimizer.with_selection_bias(joined, state.biases)
            return objective(
                all_params, batch, live, execution, config, training.balance_loss, fixed.teacher, training.remat
            )

        (_, measured), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return measured, _float32(gradient)

    def accumulated(state: State, fixed: Fixed, batch, live) -> tuple[BatchMetrics, decoder.Params]:
        count = training.accumulation
        parts = jax.tree.map(lambda rows: rows.reshape(count, -1, *rows.shape[1:]), batch)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient_of(state, fixed, part, live)), None

        first = jax.tree.map(lambda rows: rows[0], parts)
        zeros = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(gradient_of, state, fixed, first, live)
        )
        (measured, gradient), _ = lax.scan(add, zeros, parts)
        mean = jax.tree.map(lambda total: total / count, (measured.terms, gradient))
        return measured._replace(terms=mean[0]), mean[1]

    def step(state: State, fixed: Fixed, batch: dict[str, jax.Array], live: Settings):
        compute = gradient_of if training.accumulation == 1 else accumulated
        measured, gradient = compute(state, fixed, batch, live)
        updates, optimizer_state = update_rule.update(gradient, state.optimizer, _float32(state.params))
        load_LE = measured.load_LE.astype(jnp.float32)
        biases = state.biases
        if training.balance_bias_rate:
            biases = {
                stack: balance.update_bias(bias_LE, _of_stack(load_LE, stack, architecture), training.balance_bias_rate)
                for stack, bias_LE in biases.items()
            }
        metrics = measured.terms | {
            "gradient_norm": optax.tree.norm(gradient),
            "load_max_over_mean": (load_LE.max(axis=1) / (load_LE.sum(axis=1) / num_experts_L)).max(),
        }
        if execution.dispatch.drops:
            metrics["overflow_slots"] = measured.overflow
        params = optimizer.apply_updates(state.params, updates, optimizer.steps_done(state.optimizer))
        state = State(params, biases, optimizer_state)
        if layout is not None:
            state = lax.with_sharding_constraint(state, of_tree(state, layout))
        return state, whole(metrics, layout)

    return jax.jit(step, donate_argnums=0)


def _of_stack(load_LE: jax.Array, stack: str, architecture: Architecture) -> jax.Array:
    """The rows of one stack's layers, with the columns of the experts that they have."""
    columns = [layer.column for layer in layer_order.layers(architecture) if layer.stack == stack]
    experts = layer_order.moe_of(architecture, stack).num_experts
    return load_LE if len(columns) == len(load_LE) else load_LE[np.array(columns), :experts]


def _float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
