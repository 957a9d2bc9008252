"""The slots of each token in the order of their weights: worked out once, for all kinds that go by weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.selection import Slots


class ByWeight(NamedTuple):
    """Slots that are offered to the row-wise kinds; one that is not offered weighs nothing."""

    mix_NK: jax.Array  # float32, mixing weights as the router gives them
    rank_NK: jax.Array  # int32: how many slots of the token are heavier; among equals the router's order holds
    above_NK: jax.Array  # float32: what those weigh together


def by_weight(slots: Slots) -> ByWeight:
    """Compares every slot with the others of its token.

    Where a selection bias moves the choice, the order of weights is not the router's own.
    """
    mix_NK = jnp.where(slots.keep_NK, slots.mix_NK, 0.0)
    first_KK = jnp.tri(mix_NK.shape[1], k=-1, dtype=bool)  # among equals the router's order holds
    one_NK1, other_N1K = mix_NK[:, :, None], mix_NK[:, None, :]
    heavier_NKK = (other_N1K > one_NK1) | ((other_N1K == one_NK1) & first_KK[None])
    rank_NK = heavier_NKK.sum(axis=2, dtype=jnp.int32)
    return ByWeight(mix_NK, rank_NK, jnp.where(heavier_NKK, other_N1K, 0.0).sum(axis=2))
