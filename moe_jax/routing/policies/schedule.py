"""Kinds that fix the number of experts per layer, whatever the token: all set `k`, which `select` reads."""

import dataclasses
from typing import Self

import numpy as np

from moe_jax.routing.policies.columns import Columns, ModelFacts, constant, require_counts
from moe_jax.routing.policies.kind import Kind, value_of


@dataclasses.dataclass(frozen=True)
class ModelOwn(Kind):
    """`model`: the best k experts, the k that the model was trained with in each layer."""

    name, form, sets = "model", "model", ("k",)

    def columns(self, model: ModelFacts) -> Columns:
        """Slots to keep in each layer."""
        return (model.own_k_L,)

    @classmethod
    def neutral(cls, model: ModelFacts) -> Columns:
        """The model's own k, for a policy without a part that sets k."""
        return (model.own_k_L,)


@dataclasses.dataclass(frozen=True)
class TopK(Kind):
    """`topk:k`: the best k experts, the same k in every MoE layer."""

    name, form, sets = "topk", "topk:4", ModelOwn.sets
    k: int

    def __post_init__(self):
        require_counts(self.k)

    def columns(self, model: ModelFacts) -> Columns:
        """Slots to keep in each layer."""
        return (constant(model, self.k),)


@dataclasses.dataclass(frozen=True)
class Schedule(Kind):
    """`schedule:b,h,e,p`: the best b experts in the first MoE layer, h in layer p, e in the last, linear between.

    MoE layers count from 0. Interpolated values are rounded to the nearest whole number, halves up. The letters are
    those of *Faster MoE LLM Inference for Extremely Large Models*, arXiv 2505.03531, which does not say how it rounds.
    """

    name, form, sets = "schedule", "schedule:6,8,4,2", ModelOwn.sets
    b: int
    h: int
    e: int
    p: int

    def __post_init__(self):
        require_counts(self.b, self.h, self.e, self.p)

    def columns(self, model: ModelFacts) -> Columns:
        """Slots to keep in each layer; ValueError if layer p is not between the first and the last."""
        last = model.num_layers - 1
        if self.p >= last:
            raise ValueError(f"p = {self.p}; expected a layer between the first MoE layer, 0, and the last, {last}")
        k_L = np.interp(np.arange(model.num_layers), (0, self.p, last), (self.b, self.h, self.e))
        return (np.floor(k_L + 0.5).astype(np.int32),)


@dataclasses.dataclass(frozen=True)
class TopKPerLayer(Kind):
    """`layers:k,k,...`: the best k experts, one k for each MoE layer in order."""

    name, form, sets = "layers", "layers:8,8,4", ModelOwn.sets
    k_L: tuple[int, ...]

    def __post_init__(self):
        require_counts(*self.k_L)

    @classmethod
    def parsed(cls, words: list[str]) -> Self:
        """Takes one word or more; ValueError if one is not a whole number."""
        return cls(tuple(value_of(word, int) for word in words or [""]))

    @property
    def spec(self) -> str:
        """The text that parses to this part."""
        return f"{self.name}:" + ",".join(map(str, self.k_L))

    def columns(self, model: ModelFacts) -> Columns:
        """Slots to keep in each layer; ValueError if the model has another number of MoE layers."""
        if len(self.k_L) != model.num_layers:
            raise ValueError(
                f"{len(self.k_L)} layers; expected one number for each of the model's {model.num_layers} MoE layers"
            )
        return (np.asarray(self.k_L, np.int32),)
