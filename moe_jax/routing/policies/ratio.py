"""The kind `ratio`: a threshold for a slot's weight, relative to the token's largest."""

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
class Ratio(RowWise):
    """`ratio:t`: slots i with w_i >= t * w_1, where w_1 is the token's largest weight; at least `min` slots.

    Slots are ordered by weight; with a selection bias, that is not the order in which the router chose (dynamic expert
    skipping, arXiv 2402.14800, section 3.3, with one threshold for all slots).
    """

    name, form, sets = "ratio", "ratio:0.3,min=2", ("ratio", "ratio_min")
    t: PerLayer
    min: int = 1

    def __post_init__(self):
        require_between(0, 1, self.t)
        require_counts(self.min)

    def columns(self, model: ModelFacts) -> Columns:
        """The threshold of each layer, and the number of slots that are always kept."""
        return per_layer(model, self.t), constant(model, self.min)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """A threshold of 0, which keeps all slots."""
        return constant(model, 0, np.float32), constant(model, 1)

    @staticmethod
    def keeps(offered: ByWeight, t_N: jax.Array, min_N: jax.Array) -> jax.Array:
        """bool_NK: which slots are kept."""
        near_NK = offered.mix_NK >= t_N[:, None] * offered.mix_NK.max(axis=1, keepdims=True)
        return near_NK | (offered.rank_NK < min_N[:, None])
