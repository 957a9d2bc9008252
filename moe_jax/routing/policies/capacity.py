"""The kind `capacity`: limits the rows of a decode step that an expert serves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.routing.policies.columns import Columns, ModelFacts, PerLayer, constant, per_layer, require_between
from moe_jax.routing.policies.kind import StepWise
from moe_jax.routing.policies.step import filled
from moe_jax.routing.selection import Routing, Slots

OVERFLOW = ("drop", "next")


@dataclasses.dataclass(frozen=True)
class Capacity(StepWise):
    """`capacity:gamma`: its own k; an expert serves at most ceil(gamma * T * k / E) rows, those with the largest w.

    T * k is the number of slots that the rows keep. Overflow is dropped, or with `overflow=next` offered to the next
    choices: rank by rank, down to rank 2 k, a row that is short of slots asks its expert of that rank, unless it has
    asked it before; an expert accepts as many rows as it has room for, again by weight (capacity-aware inference,
    arXiv 2503.05066). Ties go to the earlier row.
    """

    name, form, sets = "capacity", "capacity:1.5,overflow=next", ("capacity", "overflow")
    gamma: PerLayer
    overflow: str = "drop"

    def __post_init__(self):
        require_between(0, float("inf"), self.gamma)
        if self.overflow not in OVERFLOW:
            raise ValueError(f"expected overflow = {' or '.join(OVERFLOW)}")

    def columns(self, model: ModelFacts) -> Columns:
        """Gamma of each layer, and the index in `OVERFLOW`."""
        return per_layer(model, self.gamma), constant(model, OVERFLOW.index(self.overflow))

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """An infinite capacity."""
        return constant(model, np.inf, np.float32), constant(model, 0)

    @staticmethod
    def choose(slots: Slots, routing: Routing, same_BB: jax.Array, gamma_B: jax.Array, overflow_B: jax.Array) -> Slots:
        """Serves the rows' own choices; then, for rows with dropped slots, the next choices."""
        num_experts, offers_B = routing.score_NE.shape[1], overflow_B == OVERFLOW.index("next")
        experts_1E = jnp.arange(num_experts)[None]
        asked_BKE = (slots.expert_NK[:, :, None] == experts_1E[None]) & slots.keep_NK[:, :, None]
        asked_BE, kept_B = asked_BKE.any(axis=1), slots.keep_NK.sum(axis=1)
        weight_BE = jnp.where(asked_BE, (asked_BKE * slots.mix_NK[:, :, None]).sum(axis=1), routing.mix_NE)
        share_B = gamma_B * (same_BB * kept_B[None]).sum(axis=1) / num_experts
        room_B = jnp.ceil(share_B - 1e-5)  # minus a rounding error, which must not add a row
        earlier_BB = jnp.tri(len(same_BB), k=-1, dtype=bool)

        def ahead(one, other, earlier):
            return (other > one) | ((other == one) & earlier)

        rival_BBE = (
            same_BB[:, :, None] & asked_BE[None] & ahead(weight_BE[:, None], weight_BE[None], earlier_BB[:, :, None])
        )
        served_BE = asked_BE & (rival_BBE.sum(axis=1) < room_B[:, None])
        dropped = slots._replace(keep_NK=slots.keep_NK & jnp.take_along_axis(served_BE, slots.expert_NK, axis=1))
        order_BE = lax.top_k(routing.score_NE, min(2 * slots.keep_NK.shape[1], num_experts))[1]

        def ask(rank, served_BE):
            expert_B = order_BE[:, rank]

            def at_expert(value_BE):
                return jnp.take_along_axis(value_BE, expert_B[:, None], axis=1)[:, 0]

            short_B = offers_B & (served_BE.sum(axis=1) < kept_B) & (rank < 2 * kept_B)
            asks_B = short_B & ~at_expert(asked_BE) & (at_expert(routing.score_NE) > -jnp.inf)
            mix_B = at_expert(weight_BE)
            rival_BB = same_BB & asks_B[None] & (expert_B[:, None] == expert_B[None])
            place_B = (rival_BB & ahead(mix_B[:, None], mix_B[None], earlier_BB)).sum(axis=1)
            taken_BE = same_BB.astype(jnp.float32) @ served_BE.astype(jnp.float32)
            taken_B = at_expert(taken_BE) + place_B < room_B
            return served_BE | ((asks_B & taken_B)[:, None] & (expert_B[:, None] == experts_1E))

        overflowed_B = offers_B & (dropped.keep_NK != slots.keep_NK).any(axis=1)
        served_BE = lax.cond(
            overflowed_B.any(), lambda: lax.fori_loop(0, order_BE.shape[1], ask, served_BE), lambda: served_BE
        )
        offered = filled(slots, Routing(routing.score_NE, weight_BE), served_BE, overflowed_B)
        return jax.tree.map(lambda new, old: jnp.where(overflowed_B[:, None], new, old), offered, dropped)
