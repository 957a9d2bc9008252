"""A routing decision, and the slots that it keeps: the seam between the router and all that runs experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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
