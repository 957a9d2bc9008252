"""AdamW with warm-up, cosine decay and clipping; its updates are added with stochastic rounding in bfloat16."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from moe_jax.config import layer_order
from moe_jax.config.schema import TrainingConfig
from moe_jax.model import parameters
from moe_jax.model.decoder import Params


def learning_rate(training: TrainingConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to `final_learning_rate_fraction` of it at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=training.learning_rate,
        warmup_steps=training.warmup_steps,
        decay_steps=training.steps,
        end_value=training.learning_rate * training.final_learning_rate_fraction,
    )


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv 1711.05101); norms and biases do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            learning_rate(training),
            b1=training.adam_b1,
            b2=training.adam_b2,
            weight_decay=training.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
        ),
    )


def _decays(path, _) -> bool:
    return parameters.find_key(path).kind is parameters.Matrix


def steps_done(state: optax.OptState) -> jax.Array:
    """int32 scalar: how many updates the optimizer has made."""
    _, (adam, *_) = state
    return adam.count


def apply_updates(params: Params, updates: Params, step: jax.Array) -> Params:
    """Adds float32 updates; bfloat16 parameters are rounded stochastically, so that the expectation is exact.

    Rounding to nearest would lose every update of less than half of a weight's last bit, which in bfloat16 is one part
    in 256: most of them.

    Args:
        params: float32 or bfloat16.
        updates: float32.
        step: int32 scalar, the seed of the rounding.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(leaves))
    return jax.tree.unflatten(tree, map(_moved, leaves, jax.tree.leaves(updates), keys))


def _moved(param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    exact = param.astype(jnp.float32) + update
    if param.dtype == jnp.float32:
        return exact
    bits = lax.bitcast_convert_type(exact, jnp.uint32) + jax.random.bits(key, exact.shape, jnp.uint16).astype(
        jnp.uint32
    )
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def without_selection_bias(params: Params) -> tuple[Params, dict[str, jax.Array]]:
    """Takes the selection bias out of the parameters: load balancing updates it, the optimizer must not.

    Returns:
        The parameters without it, and stack name -> bias_LE for each stack that has one.
    """
    without, biases = dict(params), {}
    for stack in layer_order.moe_stacks(params):
        router = dict(params[stack]["router"])
        if "bias_LE" in router:
            biases[stack] = router.pop("bias_LE")
        without[stack] = params[stack] | {"router": router}
    return without, biases


def with_selection_bias(params: Params, biases: dict[str, jax.Array]) -> Params:
    """The inverse of `without_selection_bias`."""
    routers = {stack: params[stack]["router"] | {"bias_LE": bias_LE} for stack, bias_LE in biases.items()}
    return params | {stack: params[stack] | {"router": router} for stack, router in routers.items()}
