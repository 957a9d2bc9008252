"""A policy that bounds how many rows of one decode step an expert serves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.routing.policies.batch_aware import filled, holds
from moe_jax.routing.policies.part import Model, Part, PerLayer, constant, per_layer, require_between
from moe_jax.routing.selection import Routing, Slots

OVERFLOW = ("drop", "next")


@dataclasses.dataclass(frozen=True)
class Capacity(Part):
    """`capacity:gamma`: an expert serves at most gamma * T * k / E rows, rounded up, those with the most weight.

    T * k is the number of slots that the rows keep. The overflow is dropped or, with `overflow=next`, offered to the
    next choice: rank by rank, down to twice as many as it keeps, a row that is short of slots asks its expert of that
    rank unless it has asked it before, and an expert takes as many of those as it has room for, again by weight
    (capacity-aware inference, arXiv 2503.05066). Ties go to the earlier row.
    """

    kind, form, batch_aware = "capacity", "capacity:1.5,overflow=next", True
    gamma: PerLayer
    overflow: str = "drop"

    def __post_init__(self):
        require_between(0, float("inf"), self.gamma)
        if self.overflow not in OVERFLOW:
            raise ValueError(f"wanted overflow = {' or '.join(OVERFLOW)}")

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """Gamma of each layer, and the number of what happens to the overflow."""
        overflow = constant(model, OVERFLOW.index(self.overflow))
        return {"capacity": per_layer(model, self.gamma), "overflow": overflow}


def neutral(model: Model) -> dict[str, np.ndarray]:
    """Settings under which nothing overflows."""
    return {"capacity": constant(model, np.inf, np.float32), "overflow": constant(model, 0)}


def capacity(slots: Slots, routing: Routing, gamma_B: jax.Array, overflow_B: jax.Array, same_BB: jax.Array) -> Slots:
    """See `Capacity`; works on the B rows of one step."""
    num_experts = routing.score_NE.shape[1]
    asked_BE = holds(slots, jnp.full_like(overflow_B, slots.keep_NK.shape[1]), num_experts)
    wanted_B = slots.keep_NK.sum(axis=1)
    room_B = jnp.ceil(gamma_B * (same_BB * wanted_B[None]).sum(axis=1) / num_experts)
    place_BE = _place(jnp.where(asked_BE, routing.mix_NE, -jnp.inf), asked_BE, same_BB)
    served_BE = asked_BE & (place_BE < room_B[:, None])
    dropped = slots._replace(keep_NK=slots.keep_NK & jnp.take_along_axis(served_BE, slots.expert_NK, axis=1))
    order_BE = lax.top_k(routing.score_NE, min(2 * slots.keep_NK.shape[1], num_experts))[1]

    def ask(rank, served_BE):
        expert_BE = order_BE[:, rank, None] == jnp.arange(num_experts)[None]
        short_B = (served_BE.sum(axis=1) < wanted_B) & (rank < 2 * wanted_B) & (overflow_B == OVERFLOW.index("next"))
        asks_BE = expert_BE & ~asked_BE & short_B[:, None] & (routing.score_NE > -jnp.inf)
        taken_BE = same_BB.astype(jnp.float32) @ served_BE.astype(jnp.float32)
        place_BE = _place(jnp.where(asks_BE, routing.mix_NE, -jnp.inf), asks_BE, same_BB)
        return served_BE | (asks_BE & (taken_BE + place_BE < room_B[:, None]))

    overflowed_B = (dropped.keep_NK != slots.keep_NK).any(axis=1)
    served_BE = lax.cond(
        (overflowed_B & (overflow_B == OVERFLOW.index("next"))).any(),
        lambda: lax.fori_loop(0, order_BE.shape[1], ask, served_BE),
        lambda: served_BE,
    )
    offered = filled(slots, routing, served_BE, overflowed_B)
    return jax.tree.map(
        lambda new, old: jnp.where((overflow_B == OVERFLOW.index("next"))[:, None], new, old), offered, dropped
    )


def _place(weight_BE: jax.Array, asks_BE: jax.Array, same_BB: jax.Array) -> jax.Array:
    """int32_BE: how many rows, of those that act together, ask an expert with more weight than this one."""
    earlier_BB = jnp.tri(len(same_BB), k=-1, dtype=bool)
    one_B1E, other_1BE = weight_BE[:, None], weight_BE[None]
    ahead_BBE = (other_1BE > one_B1E) | ((other_1BE == one_B1E) & earlier_BB[:, :, None])
    return (ahead_BBE & asks_BE[None] & same_BB[:, :, None]).sum(axis=1, dtype=jnp.int32)
