"""The kind `renormalize`: the sum of the kept slots' weights."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing.policies.columns import Columns, ModelFacts, constant
from moe_jax.routing.policies.kind import Kind
from moe_jax.routing.selection import Selection, Slots

RULES = ("none", "own", "one")  # settings are indices into this; see `weigh`


@dataclasses.dataclass(frozen=True)
class Renormalize(Kind):
    """`renormalize:to`: the same slots; weights unchanged (`none`), summing to those of the own k (`own`) or to `one`.

    See `weigh`. Without this part, the model's own rule holds. Its column is always present, and `select` reads it.
    """

    name, form, sets = "renormalize", "renormalize:none", ("renormalize",)
    to: str

    def __post_init__(self):
        if self.to not in RULES:
            raise ValueError(f"expected one of {', '.join(RULES)}")

    def columns(self, model: ModelFacts) -> Columns:
        """The index of the rule."""
        return (constant(model, RULES.index(self.to)),)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """The model's own rule."""
        return (constant(model, RULES.index("one" if model.normalize else "none")),)


def weigh(slots: Slots, own_sum_N: jax.Array, rule_N: jax.Array, moe: MoEConfig) -> Selection:
    """Weights the kept slots, and renormalises the weights if the rule says so.

    In the full model, the weight of a slot is its mixing weight times `moe.routed_scaling`, and divided by the sum over
    the model's own k if `moe.normalize`. With "none" a kept slot keeps that weight. With "own" the weights of the kept
    slots are scaled to the sum over the model's own k; with "one" they sum to one, before `moe.routed_scaling`. If
    `moe.normalize`, "own" and "one" are the same; it is what such models do when configured for another k
    (DeepSeek-V3, GLM-4.5). A model that does not normalise (DeepSeek-V2-Lite) does "none".

    Args:
        slots: kept or not.
        own_sum_N: float32, the sum of the mixing weights of the model's own k experts.
        rule_N: int32, indices into `RULES`.
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
