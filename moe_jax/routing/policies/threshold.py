"""Policies that keep the slots of a token by their mixing weights, and how what is kept is renormalised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.policies.part import (
    Model,
    Part,
    PerLayer,
    constant,
    per_layer,
    require_between,
    require_counts,
)
from moe_jax.routing.selection import RENORMALIZATIONS, Slots


@dataclasses.dataclass(frozen=True)
class Ratio(Part):
    """`ratio:t`: keep a slot while w_i >= t * w_1, w_1 being the token's heaviest, and at least `min` slots.

    Slots are taken by weight, the heaviest first: where a selection bias moves the choice, that is not the router's own
    order (dynamic expert skipping, arXiv 2402.14800, section 3.3, with one threshold for all slots).
    """

    kind, form = "ratio", "ratio:0.3,min=2"
    t: PerLayer
    min: int = 1

    def __post_init__(self):
        require_between(0, 1, self.t)
        require_counts(self.min)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The threshold of each layer, and the slots that it never drops."""
        return {"ratio": per_layer(model, self.t), "ratio_min": constant(model, self.min)}


@dataclasses.dataclass(frozen=True)
class Median(Part):
    """`median`: `ratio` with the median of w_i / w_1 over calibration tokens as each layer's threshold, times `scale`.

    The median is taken over the slots i = 2 to k together (arXiv 2402.14800, section 3.3, has two slots, and drops the
    second below the median of their ratio).
    """

    kind, form = "median", "median:scale=0.8,min=2"
    scale: float = 1.0
    min: int = 1

    def __post_init__(self):
        require_between(0, float("inf"), (self.scale,))
        require_counts(self.min)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The threshold of each layer, and the slots that it never drops; ValueError without a calibration."""
        if model.calibration is None:
            raise ValueError("wanted policy.calibration, a file that `launch/calibrate.py` writes for this model")
        t_L = np.minimum(self.scale * model.calibration.median_ratio_L, 1.0).astype(np.float32)
        return {"ratio": t_L, "ratio_min": constant(model, self.min)}


@dataclasses.dataclass(frozen=True)
class Mass(Part):
    """`mass:p`: keep slots, the heaviest first, until their share of the token's weight is p; at least `min` slots.

    A slot is kept while the slots heavier than it hold less than p of what the slots of its token hold together.
    """

    kind, form = "mass", "mass:0.8,min=2"
    p: PerLayer
    min: int = 1

    def __post_init__(self):
        require_between(0, 1, self.p)
        require_counts(self.min)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The share of each layer, and the slots that it never drops."""
        return {"mass": per_layer(model, self.p), "mass_min": constant(model, self.min)}


@dataclasses.dataclass(frozen=True)
class Renormalize(Part):
    """`renormalize:none`, `:own` or `:one`: see `selection.weigh`. Left out, what the model itself does."""

    kind, form = "renormalize", "renormalize:none"
    to: str

    def __post_init__(self):
        if self.to not in RENORMALIZATIONS:
            raise ValueError(f"wanted one of {', '.join(RENORMALIZATIONS)}")

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The number of the rule."""
        return {"renormalize": constant(model, RENORMALIZATIONS.index(self.to))}


def neutral(model: Model) -> dict[str, np.ndarray]:
    """Settings that drop nothing, and weight as the model does."""
    own_rule = RENORMALIZATIONS.index("one" if model.normalize else "none")
    floats = {"ratio": constant(model, 0, np.float32), "mass": constant(model, 1, np.float32)}
    wholes = {"ratio_min": constant(model, 1), "mass_min": constant(model, 1), "renormalize": constant(model, own_rule)}
    return floats | wholes


def drop(slots: Slots, of_N: dict[str, jax.Array]) -> Slots:
    """Drops slots by `ratio` and by `mass`; each looks at the slots that came in, and a slot has to pass both.

    Args:
        slots: of N tokens.
        of_N: settings of each token, by name.
    """
    mix_NK = jnp.where(slots.keep_NK, slots.mix_NK, 0.0)
    first_KK = jnp.tri(mix_NK.shape[1], k=-1, dtype=bool)  # among equals the router's order holds
    one_NK1, other_N1K = mix_NK[:, :, None], mix_NK[:, None, :]
    heavier_NKK = (other_N1K > one_NK1) | ((other_N1K == one_NK1) & first_KK[None])
    rank_NK = heavier_NKK.sum(axis=2, dtype=jnp.int32)
    above_NK = jnp.where(heavier_NKK, other_N1K, 0.0).sum(axis=2)
    near_NK = mix_NK >= of_N["ratio"][:, None] * mix_NK.max(axis=1, keepdims=True)
    needed_NK = above_NK < of_N["mass"][:, None] * mix_NK.sum(axis=1, keepdims=True)
    needed_NK |= of_N["mass"][:, None] >= 1
    by_ratio_NK = near_NK | (rank_NK < of_N["ratio_min"][:, None])
    by_mass_NK = needed_NK | (rank_NK < of_N["mass_min"][:, None])
    return slots._replace(keep_NK=slots.keep_NK & by_ratio_NK & by_mass_NK)
