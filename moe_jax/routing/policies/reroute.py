"""The kind `reroute`: replaces experts that no row of a decode step needs most by similar ones that some row does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.policies.columns import (
    Columns,
    ModelFacts,
    PerLayer,
    constant,
    per_layer,
    require_between,
    require_counts,
)
from moe_jax.routing.policies.kind import StepWise
from moe_jax.routing.policies.step import anyone, holds
from moe_jax.routing.selection import Routing, Slots


@dataclasses.dataclass(frozen=True)
class Reroute(StepWise):
    """`reroute:k0,s`: its own k; an expert in no row's best k0 becomes the most similar one that is, if that is >= s.

    The similarity of experts is measured by calibration. The new expert must be one that the row's router can choose;
    it gets the mixing weight of the replaced one. Slots of a row with the same expert merge, and their weights add
    (similarity-based re-routing, arXiv 2602.07616).
    """

    name, form, sets = "reroute", "reroute:3,0.5", ("reroute", "reroute_above")
    k0: int
    s: PerLayer

    def __post_init__(self):
        require_counts(self.k0)
        require_between(-1, float("inf"), self.s)

    def columns(self, model: ModelFacts) -> Columns:
        """The slots of a row that are never replaced, and the least similarity; ValueError without calibration."""
        model.calibrated()
        return constant(model, self.k0), per_layer(model, self.s)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """No slot is replaced, and no expert is similar enough."""
        return constant(model, model.num_experts), constant(model, np.inf, np.float32)

    @staticmethod
    def table(model: ModelFacts) -> np.ndarray:
        """float32 similarity_LEE."""
        return model.calibrated().similarity_LEE

    @staticmethod
    def choose(
        slots: Slots,
        routing: Routing,
        same_BB: jax.Array,
        k0_B: jax.Array,
        above_B: jax.Array,
        similarity_EE: jax.Array,
    ) -> Slots:
        """Replaces experts, then merges the slots with the same expert."""
        experts = slice(routing.score_NE.shape[1])  # a layer may have fewer than the largest
        similarity_EE = similarity_EE[experts, experts]
        primary_BE = anyone(same_BB, holds(slots, k0_B, len(similarity_EE)))
        target_BE = primary_BE & (routing.score_NE > -jnp.inf)
        similarity_BKE = jnp.where(target_BE[:, None, :], similarity_EE[slots.expert_NK], -jnp.inf)
        is_primary_BK = jnp.take_along_axis(primary_BE, slots.expert_NK, axis=1)
        replaced_BK = ~is_primary_BK & (similarity_BKE.max(axis=2) >= above_B[:, None]) & slots.keep_NK
        expert_BK = jnp.where(replaced_BK, similarity_BKE.argmax(axis=2).astype(jnp.int32), slots.expert_NK)
        kept_BKK = slots.keep_NK[:, :, None] & slots.keep_NK[:, None, :]
        alike_BKK = (expert_BK[:, :, None] == expert_BK[:, None, :]) & kept_BKK
        first_BK = ~(alike_BKK & jnp.tri(expert_BK.shape[1], k=-1, dtype=bool)[None]).any(axis=2)
        merged_BK = jnp.where(alike_BKK, slots.mix_NK[:, None, :], 0.0).sum(axis=2)
        return Slots(expert_BK, jnp.where(slots.keep_NK, merged_BK, slots.mix_NK), slots.keep_NK & first_BK)
