"""Routing decisions and selected slots: the interface between the router, the policies and what runs experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Routing(NamedTuple):
    """The router's output for N tokens and E experts, in float32."""

    score_NE: jax.Array  # for choosing: the largest win; -inf: the expert cannot be chosen
    mix_NE: jax.Array  # mixing weights, not normalized


class Slots(NamedTuple):
    """The experts of each token, best first, as the policies read and change them."""

    expert_NK: jax.Array  # int32
    mix_NK: jax.Array  # float32, the router's mixing weights
    keep_NK: jax.Array  # bool


class Selection(NamedTuple):
    """The final slots of each token, the same for every policy."""

    expert_NK: jax.Array  # int32
    weight_NK: jax.Array  # float32; 0 if not kept
    keep_NK: jax.Array  # bool; slots that are not kept are not computed


def distinct_experts(chosen_LNK: np.ndarray) -> np.ndarray:
    """Int [L]: the number of distinct experts in the slots of each layer; -1 is no expert."""
    layers = len(chosen_LNK)
    seen_LE = np.zeros((layers, chosen_LNK.max(initial=0) + 2), bool)  # the last column: slots without an expert
    seen_LE[np.arange(layers)[:, None], chosen_LNK.reshape(layers, -1)] = True
    return seen_LE[:, :-1].sum(axis=1)


def top_slots(routing: Routing, count: int) -> tuple[jax.Array, jax.Array]:
    """The best `count` experts of each token, best first; the lower index wins a tie.

    Returns:
        expert_NK int32, and mix_NK float32, the unnormalised mixing weights.
    """
    _, expert_NK = lax.top_k(routing.score_NE, count)
    return expert_NK, jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1)
