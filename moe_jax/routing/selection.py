"""A routing decision, and the slots that it keeps: the seam between the router and all that runs experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.architecture import MoEConfig


class Routing(NamedTuple):
    """What the router says of N tokens and E experts, in float32."""

    score_NE: jax.Array  # for choosing: the largest win; -inf where an expert is out of reach
    mix_NE: jax.Array  # for weighting


class Selection(NamedTuple):
    """The slots of each token, best first. Nothing downstream knows which policy chose them."""

    expert_NK: jax.Array  # int32
    weight_NK: jax.Array  # float32; 0 where not kept
    keep_NK: jax.Array  # bool; a slot that is not kept reads no weights and does no arithmetic


def top_slots(routing: Routing, k_max: int) -> tuple[jax.Array, jax.Array]:
    """The k_max best experts of each token, best first; the lower index wins a tie.

    Returns:
        expert_NK int32, and mix_NK float32, the unnormalised mixing weights.
    """
    _, expert_NK = lax.top_k(routing.score_NE, k_max)
    return expert_NK, jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1)


def weigh(expert_NK: jax.Array, mix_NK: jax.Array, keep_NK: jax.Array, moe: MoEConfig) -> Selection:
    """Weights the kept slots by the model's own rule.

    With `moe.normalize` the weights of a token's kept slots sum to one before scaling, so they change with the number
    kept: the rule of DeepSeek-V3 and GLM-4.5, applied as if the model had been configured for that many. Without it a
    slot weighs the same whatever else is kept (DeepSeek-V2-Lite).
    """
    weight_NK = jnp.where(keep_NK, mix_NK, 0.0)
    if moe.normalize:
        weight_NK = weight_NK / (weight_NK.sum(axis=1, keepdims=True) + 1e-20)
    return Selection(expert_NK, weight_NK * moe.routed_scaling, keep_NK)
