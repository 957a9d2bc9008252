"""AdamW with warm-up, cosine decay and clipping, on the parameters that gradients reach."""

import jax
import optax

from moe_jax.config.schema import TrainingConfig
from moe_jax.model.decoder import Params


def learning_rate(training: TrainingConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine that ends at its stated fraction with the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=training.learning_rate,
        warmup_steps=training.warmup_steps,
        decay_steps=training.steps,
        end_value=training.learning_rate * training.final_learning_rate_fraction,
    )


def _is_matrix(path: tuple, _) -> bool:
    return "norm" not in path[-1].key and "bias" not in path[-1].key


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv 1711.05101); norms and biases do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            learning_rate(training),
            b1=training.adam_b1,
            b2=training.adam_b2,
            weight_decay=training.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params),
        ),
    )


def without_selection_bias(params: Params) -> tuple[Params, jax.Array | None]:
    """Takes the selection bias out of the parameters: balancing moves it, the optimizer must not."""
    router = dict(params["moe"]["router"])
    bias_LE = router.pop("bias_LE", None)
    return params | {"moe": params["moe"] | {"router": router}}, bias_LE


def with_selection_bias(params: Params, bias_LE: jax.Array | None) -> Params:
    """The inverse of `without_selection_bias`."""
    if bias_LE is None:
        return params
    return params | {"moe": params["moe"] | {"router": params["moe"]["router"] | {"bias_LE": bias_LE}}}
