"""Policies that choose the experts of one decode step for all its rows together, so that fewer distinct ones are read.

Each works on the B rows of one step; rows act together where `same_BB` says so. What a row's own policy kept comes in,
and no row ever keeps more slots than that, though they may hold other experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.routing.policies.part import Model, Part, PerLayer, constant, per_layer, require_between, require_counts
from moe_jax.routing.selection import Routing, Slots


@dataclasses.dataclass(frozen=True)
class Opportunistic(Part):
    """`opportunistic:k0`: the rows' best k0 form a set, out of which every row fills up to its k in its own order.

    (Opportunistic expert activation, arXiv 2511.02237.) With k0 = k it changes nothing.
    """

    kind, form, batch_aware = "opportunistic", "opportunistic:3", True
    k0: int

    def __post_init__(self):
        require_counts(self.k0)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The slots of a row that enter the set."""
        return {"opportunistic": constant(model, self.k0)}


@dataclasses.dataclass(frozen=True)
class Budget(Part):
    """`budget:m`: rows choose among m experts of a layer, those with the most weight over all rows.

    The set begins with the best `floor` experts of every row, however many those are, and grows by the experts whose
    mixing weights, summed over the rows, are largest, until it holds m: the greedy choice, which is the best one for a
    sum (XShare, arXiv 2602.07265). Every row then fills up to its k out of the set in its own order.
    """

    kind, form, batch_aware = "budget", "budget:32", True
    m: int
    floor: int = 1

    def __post_init__(self):
        require_counts(self.m, self.floor)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The size of the set, and the slots of a row that are in it whatever their weight."""
        return {"budget": constant(model, self.m), "budget_floor": constant(model, self.floor)}


@dataclasses.dataclass(frozen=True)
class Reroute(Part):
    """`reroute:k0,s`: an expert that is in no row's best k0 is replaced by the one of those that is most like it.

    It is replaced where their calibrated similarity is at least s, by an expert within the row's reach, and keeps its
    own mixing weight; slots of a row that then name one expert merge, and their weights add (similarity-based
    re-routing, arXiv 2602.07616).
    """

    kind, form, batch_aware = "reroute", "reroute:3,0.5", True
    k0: int
    s: PerLayer

    def __post_init__(self):
        require_counts(self.k0)
        require_between(-1, float("inf"), self.s)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The slots of a row that are never replaced, and the least similarity; ValueError without a calibration."""
        if model.calibration is None:
            raise ValueError("wanted policy.calibration, a file that `launch/calibrate.py` writes for this model")
        return {"reroute": constant(model, self.k0), "reroute_above": per_layer(model, self.s)}


def neutral(model: Model) -> dict[str, np.ndarray]:
    """Settings that leave every row what it has."""
    everyone = constant(model, model.num_experts)
    never = constant(model, np.inf, np.float32)
    return {
        "opportunistic": everyone,
        "budget": everyone,
        "budget_floor": constant(model, 1),
        "reroute": everyone,
        "reroute_above": never,
    }


def opportunistic(slots: Slots, routing: Routing, k0_B: jax.Array, same_BB: jax.Array) -> Slots:
    """See `Opportunistic`."""
    pool_BE = anyone(same_BB, holds(slots, k0_B, routing.score_NE.shape[1]))
    return filled(slots, routing, pool_BE, k0_B < slots.keep_NK.sum(axis=1))


def budget(slots: Slots, routing: Routing, m_B: jax.Array, floor_B: jax.Array, same_BB: jax.Array) -> Slots:
    """See `Budget`."""
    num_experts = routing.score_NE.shape[1]
    forced_BE = anyone(same_BB, holds(slots, floor_B, num_experts))
    mix_BE = jnp.where(routing.score_NE > -jnp.inf, routing.mix_NE, 0.0)
    weight_BE = jnp.matmul(same_BB.astype(jnp.float32), mix_BE, precision=lax.Precision.HIGHEST)
    order_BE = jnp.argsort(jnp.where(forced_BE, -jnp.inf, -weight_BE), axis=1, stable=True)
    rank_BE = jnp.argsort(order_BE, axis=1, stable=True)
    return filled(slots, routing, forced_BE | (rank_BE < m_B[:, None]), m_B < num_experts)


def reroute(
    slots: Slots, routing: Routing, k0_B: jax.Array, above_B: jax.Array, similarity_EE: jax.Array, same_BB: jax.Array
) -> Slots:
    """See `Reroute`."""
    primary_BE = anyone(same_BB, holds(slots, k0_B, len(similarity_EE)))
    target_BE = primary_BE & (routing.score_NE > -jnp.inf)
    similarity_BKE = jnp.where(target_BE[:, None, :], similarity_EE[slots.expert_NK], -jnp.inf)
    is_primary_BK = jnp.take_along_axis(primary_BE, slots.expert_NK, axis=1)
    replaced_BK = ~is_primary_BK & (similarity_BKE.max(axis=2) >= above_B[:, None]) & slots.keep_NK
    expert_BK = jnp.where(replaced_BK, similarity_BKE.argmax(axis=2).astype(jnp.int32), slots.expert_NK)
    alike_BKK = (expert_BK[:, :, None] == expert_BK[:, None, :]) & slots.keep_NK[:, :, None] & slots.keep_NK[:, None, :]
    first_BK = ~(alike_BKK & jnp.tri(expert_BK.shape[1], k=-1, dtype=bool)[None]).any(axis=2)
    merged_BK = jnp.where(alike_BKK, slots.mix_NK[:, None, :], 0.0).sum(axis=2)
    return Slots(expert_BK, jnp.where(slots.keep_NK, merged_BK, slots.mix_NK), slots.keep_NK & first_BK)


def holds(slots: Slots, count_B: jax.Array, num_experts: int) -> jax.Array:
    """bool_BE: whether an expert is in one of the first so many slots that a row keeps."""
    early_BK = slots.keep_NK & (jnp.cumsum(slots.keep_NK, axis=1) <= count_B[:, None])
    return ((slots.expert_NK[:, :, None] == jnp.arange(num_experts)[None, None]) & early_BK[:, :, None]).any(axis=1)


def anyone(same_BB: jax.Array, holds_BE: jax.Array) -> jax.Array:
    """bool_BE: whether it holds for any row that acts together with this one."""
    return same_BB.astype(jnp.float32) @ holds_BE.astype(jnp.float32) > 0


def filled(slots: Slots, routing: Routing, pool_BE: jax.Array, acting_B: jax.Array) -> Slots:
    """Every row that acts keeps as many slots as it did, of the best experts in its pool, as far as there are any."""
    score_BK, expert_BK = lax.top_k(jnp.where(pool_BE, routing.score_NE, -jnp.inf), slots.keep_NK.shape[1])
    kept_B = slots.keep_NK.sum(axis=1)
    keep_BK = (jnp.arange(expert_BK.shape[1])[None] < kept_B[:, None]) & (score_BK > -jnp.inf)
    mix_BK = jnp.take_along_axis(routing.mix_NE, expert_BK, axis=1)
    filled = Slots(expert_BK.astype(jnp.int32), mix_BK, keep_BK)
    return jax.tree.map(lambda new, old: jnp.where(acting_B[:, None], new, old), filled, slots)
