"""The kind `median`: thresholds for `ratio`, measured on calibration text."""

import dataclasses

import numpy as np

from moe_jax.routing.policies.columns import Columns, ModelFacts, constant, require_between, require_counts
from moe_jax.routing.policies.kind import Kind
from moe_jax.routing.policies.ratio import Ratio


@dataclasses.dataclass(frozen=True)
class Median(Kind):
    """`median`: `ratio` with t = `scale` * the layer's median of w_i / w_1 over calibration tokens, i = 2 to k.

    The median is over slots i = 2 to k together. (arXiv 2402.14800, section 3.3, has two slots, and drops the second
    if their ratio is below its median.)
    """

    name, form, sets = "median", "median:scale=0.8,min=2", Ratio.sets
    scale: float = 1.0
    min: int = 1

    def __post_init__(self):
        require_between(0, float("inf"), (self.scale,))
        require_counts(self.min)

    def columns(self, model: ModelFacts) -> Columns:
        """The threshold of each layer, and the number of slots that are always kept; ValueError without calibration."""
        t_L = np.minimum(self.scale * model.calibrated().median_ratio_L, 1.0).astype(np.float32)
        return t_L, constant(model, self.min)
