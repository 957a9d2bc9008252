"""A routing decision, and the slots that it keeps: the seam between the router and all that runs experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.config.architecture import MoEConfig

RENORMALIZATIONS = ("none", "own", "one")  # by their number, see `weigh`


class Routing(NamedTuple):
    """What the router says of N tokens and E experts, in float32."""

    score_NE: jax.Array  # for choosing: the largest win; -inf where an expert is out of reach
    mix_NE: jax.Array  # for weighting


class Slots(NamedTuple):
    """The experts of each token, best first, on the way through the policies."""

    expert_NK: jax.Array  # int32
    mix_NK: jax.Array  # float32, mixing weights as the router gives them
    keep_NK: jax.Array  # bool


class Selection(NamedTuple):
    """The slots of each token. Nothing downstream knows which policy chose them."""

    expert_NK: jax.Array  # int32
    weight_NK: jax.Array  # float32; 0 where not kept
    keep_NK: jax.Array  # bool; a slot that is not kept reads no weights and does no arithmetic


def distinct_experts(chosen_LNK: np.ndarray) -> np.ndarray:
    """Int [L]: how many different experts stand in the slots of each layer; -1 is none."""
    layers = len(chosen_LNK)
    seen_LE = np.zeros((layers, chosen_LNK.max(initial=0) + 2), bool)  # the last column takes the slots without one
    seen_LE[np.arange(layers)[:, None], chosen_LNK.reshape(layers, -1)] = True
    return seen_LE[:, :-1].sum(axis=1)


def top_slots(routing: Routing, count: int) -> tuple[jax.Array, jax.Array]:
    """So many best experts of each token, best first; the lower index wins a tie.

    Returns:
        expert_NK int32, and mix_NK float32, the unnormalised mixing weights.
    """
    _, expert_NK = lax.top_k(routing.score_NE, count)
    return expert_NK, jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1)


def weigh(slots: Slots, own_sum_N: jax.Array, renormalize_N: jax.Array, moe: MoEConfig) -> Selection:
    """Weights the kept slots, which after dropping may be renormalised.

    The full model's weight of a slot is its mixing weight, divided by the sum over the model's own k where
    `moe.normalize`, times `moe.routed_scaling`. With "none" a kept slot keeps that weight; with "own" the kept slots
    are scaled to sum to what the model's own k summed to; with "one" to one before the scaling. Where `moe.normalize`,
    the model's own k sum to one, so "own" and "one" are the same; it is what these models do when they are configured
    for another k (DeepSeek-V3, GLM-4.5). A model that does not normalise (DeepSeek-V2-Lite) does "none".

    Args:
        slots: kept or not.
        own_sum_N: float32, mixing weights summed over the k experts that the full model would choose.
        renormalize_N: int32, numbers of `RENORMALIZATIONS`.
        moe: the section of the configuration.
    """
    mix_NK = jnp.where(slots.keep_NK, slots.mix_NK, 0.0)
    kept_sum_N = mix_NK.sum(axis=1)
    none_N, own_N = (renormalize_N == RENORMALIZATIONS.index(name) for name in ("none", "own"))
    divisor_N = jnp.where(none_N, own_sum_N if moe.normalize else 1.0, kept_sum_N)
    if not moe.normalize:
        divisor_N = jnp.where(own_N, kept_sum_N / (own_sum_N + 1e-20), divisor_N)
    weight_NK = mix_NK / (divisor_N[:, None] + 1e-20)
    return Selection(slots.expert_NK, weight_NK * moe.routed_scaling, slots.keep_NK)
