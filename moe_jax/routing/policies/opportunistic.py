"""The kind `opportunistic`: rows of a decode step choose among the best experts of any row."""

import dataclasses

import jax

from moe_jax.routing.policies.columns import Columns, ModelFacts, constant, require_counts
from moe_jax.routing.policies.kind import StepWise
from moe_jax.routing.policies.step import anyone, filled, holds
from moe_jax.routing.selection import Routing, Slots


@dataclasses.dataclass(frozen=True)
class Opportunistic(StepWise):
    """`opportunistic:k0`: its best k among the experts in any row's best k0.

    Opportunistic expert activation, arXiv 2511.02237. With k0 = k it changes nothing.
    """

    name, form, sets = "opportunistic", "opportunistic:3", ("opportunistic",)
    k0: int

    def __post_init__(self):
        require_counts(self.k0)

    def columns(self, model: ModelFacts) -> Columns:
        """The number of a row's best experts that enter the set."""
        return (constant(model, self.k0),)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """All experts of a row enter the set."""
        return (constant(model, model.num_experts),)

    @staticmethod
    def choose(slots: Slots, routing: Routing, same_BB: jax.Array, k0_B: jax.Array) -> Slots:
        """Fills the slots of rows that keep more than k0 from the set."""
        pool_BE = anyone(same_BB, holds(slots, k0_B, routing.score_NE.shape[1]))
        return filled(slots, routing, pool_BE, k0_B < slots.keep_NK.sum(axis=1))
