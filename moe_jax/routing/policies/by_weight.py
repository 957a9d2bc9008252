"""The order of each token's slots by weight, computed once for all kinds that use it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.selection import Slots


class ByWeight(NamedTuple):
    """The slots that are offered to the row-wise kinds; other slots have weight 0."""

    mix_NK: jax.Array  # float32, the router's mixing weights
    rank_NK: jax.Array  # int32: number of heavier slots of the token; ties keep the router's order
    above_NK: jax.Array  # float32: sum of the weights of those slots


def by_weight(slots: Slots) -> ByWeight:
    """Compares every slot with the others of its token.

    With a selection bias, the order by weight is not the order in which the router chose.
    """
    mix_NK = jnp.where(slots.keep_NK, slots.mix_NK, 0.0)
    first_KK = jnp.tri(mix_NK.shape[1], k=-1, dtype=bool)  # ties keep the router's order
    one_NK1, other_N1K = mix_NK[:, :, None], mix_NK[:, None, :]
    heavier_NKK = (other_N1K > one_NK1) | ((other_N1K == one_NK1) & first_KK[None])
    rank_NK = heavier_NKK.sum(axis=2, dtype=jnp.int32)
    return ByWeight(mix_NK, rank_NK, jnp.where(heavier_NKK, other_N1K, 0.0).sum(axis=2))
