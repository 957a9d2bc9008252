"""The kind `mass`: the heaviest slots of a token, up to a share of its weight."""

import dataclasses

import jax
import numpy as np

from moe_jax.routing.policies.by_weight import ByWeight
from moe_jax.routing.policies.columns import (
    Columns,
    ModelFacts,
    PerLayer,
    constant,
    per_layer,
    require_between,
    require_counts,
)
from moe_jax.routing.policies.kind import RowWise


@dataclasses.dataclass(frozen=True)
class Mass(RowWise):
    """`mass:p`: the fewest heaviest slots whose weights sum to p * (w_1 + ... + w_k) or more; at least `min` slots.

    A slot is kept if the slots heavier than it have less than the share p of the weight of the token's offered slots;
    ties keep the router's order. With p = 1 all are kept.
    """

    name, form, sets = "mass", "mass:0.8,min=2", ("mass", "mass_min")
    p: PerLayer
    min: int = 1

    def __post_init__(self):
        require_between(0, 1, self.p)
        require_counts(self.min)

    def columns(self, model: ModelFacts) -> Columns:
        """The share p of each layer, and the number of slots that are always kept."""
        return per_layer(model, self.p), constant(model, self.min)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """A share of 1, which keeps all slots."""
        return constant(model, 1, np.float32), constant(model, 1)

    @staticmethod
    def keeps(offered: ByWeight, p_N: jax.Array, min_N: jax.Array) -> jax.Array:
        """bool_NK: which slots are kept."""
        needed_NK = offered.above_NK < p_N[:, None] * offered.mix_NK.sum(axis=1, keepdims=True)
        needed_NK |= p_N[:, None] >= 1
        return needed_NK | (offered.rank_NK < min_N[:, None])
