"""The kind `renormalize`: what the weights of the kept slots sum to."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing.policies.columns import Columns, Model, constant
from moe_jax.routing.policies.kind import Kind
from moe_jax.routing.selection import Selection, Slots

RULES = ("none", "own", "one")  # by their number, see `weigh`


@dataclasses.dataclass(frozen=True)
class Renormalize(Kind):
    """`renormalize:to`: the same slots; weights stay (`none`), sum to what the model's own k do (`own`), or to `one`.

    See `weigh`. Left out, what the model itself does. Its column is always there, and `select` reads it.
    """

    name, form, sets = "renormalize", "renormalize:none", ("renormalize",)
    to: str

    def __post_init__(self):
        if self.to not in RULES:
            raise ValueError(f"expected one of {', '.join(RULES)}")

    def columns(self, model: Model) -> Columns:
        """The number of the rule."""
        return (constant(model, RULES.index(self.to)),)

    @classmethod
    def neutral(cls, model: Model) -> Columns:
        """What the model itself does."""
        return (constant(model, RULES.index("one" if model.normalize else "none")),)


def weigh(slots: Slots, own_sum_N: jax.Array, rule_N: jax.Array, moe: MoEConfig) -> Selection:
    """Weights the kept slots, which after dropping may be renormalised.

    The full model's weight of a slot is its mixing weight, divided by the sum over the model's own k where
    `moe.normalize`, times `moe.routed_scaling`. With "none" a kept slot keeps that weight; with "own" the kept slots
    are scaled to sum to what the model's own k summed to; with "one" to one before the scaling. Where `moe.normalize`,
    the model's own k sum to one, so "own" and "one" are the same; it is what these models do when they are configured
    for another k (DeepSeek-V3, GLM-4.5). A model that does not normalise (DeepSeek-V2-Lite) does "none".

    Args:
        slots: kept or not.
        own_sum_N: float32, mixing weights summed over the k experts that the full model would choose.
        rule_N: int32, numbers of `RULES`.
        moe: the section of the configuration.
    """
    mix_NK = jnp.where(slots.keep_NK, slots.mix_NK, 0.0)
    kept_sum_N = mix_NK.sum(axis=1)
    none_N, own_N = (rule_N == RULES.index(name) for name in ("none", "own"))
    divisor_N = jnp.where(none_N, own_sum_N if moe.normalize else 1.0, kept_sum_N)
    if not moe.normalize:
        divisor_N = jnp.where(own_N, kept_sum_N / (own_sum_N + 1e-20), divisor_N)
    weight_NK = mix_NK / (divisor_N[:, None] + 1e-20)
    return Selection(slots.expert_NK, weight_NK * moe.routed_scaling, slots.keep_NK)
