"""The kind `budget`: all rows of a decode step together use a given number of experts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.routing.policies.columns import Columns, ModelFacts, constant, require_counts
from moe_jax.routing.policies.kind import StepWise
from moe_jax.routing.policies.step import anyone, filled, holds
from moe_jax.routing.selection import Routing, Slots


@dataclasses.dataclass(frozen=True)
class Budget(StepWise):
    """`budget:m`: its best k of m experts: every row's best `floor`, then those with the largest sum of w over rows.

    The set starts with the best `floor` experts of every row, however many these are. Experts with the largest sum of
    mixing weights over the rows are added until it has m: for a sum, this greedy choice is optimal (XShare,
    arXiv 2602.07265). Every row then takes its best k from the set.
    """

    name, form, sets = "budget", "budget:32", ("budget", "budget_floor")
    m: int
    floor: int = 1

    def __post_init__(self):
        require_counts(self.m, self.floor)

    def columns(self, model: ModelFacts) -> Columns:
        """The size of the set, and the number of each row's best experts that are always in it."""
        return constant(model, self.m), constant(model, self.floor)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """A set of all experts."""
        return constant(model, model.num_experts), constant(model, 1)

    @staticmethod
    def choose(slots: Slots, routing: Routing, same_BB: jax.Array, m_B: jax.Array, floor_B: jax.Array) -> Slots:
        """Fills the slots of the rows from the set, unless it has all experts."""
        num_experts = routing.score_NE.shape[1]
        forced_BE = anyone(same_BB, holds(slots, floor_B, num_experts))
        mix_BE = jnp.where(routing.score_NE > -jnp.inf, routing.mix_NE, 0.0)
        weight_BE = jnp.matmul(same_BB.astype(jnp.float32), mix_BE, precision=lax.Precision.HIGHEST)
        order_BE = jnp.argsort(jnp.where(forced_BE, -jnp.inf, -weight_BE), axis=1, stable=True)
        rank_BE = jnp.argsort(order_BE, axis=1, stable=True)
        return filled(slots, routing, forced_BE | (rank_BE < m_B[:, None]), m_B < num_experts)
