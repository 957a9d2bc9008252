"""Policies that fix the number of experts of each layer before any token is seen."""

import dataclasses

import numpy as np

from moe_jax.routing.policies.part import Model, Part, constant, require_counts


@dataclasses.dataclass(frozen=True)
class ModelOwn(Part):
    """`model`: the k that the model was trained with."""

    kind, form = "model", "model"

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """Slots to keep in each layer."""
        return {"k": model.own_k_L}


@dataclasses.dataclass(frozen=True)
class TopK(Part):
    """`topk:k`: the same k in every MoE layer."""

    kind, form = "topk", "topk:4"
    k: int

    def __post_init__(self):
        require_counts(self.k)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """Slots to keep in each layer."""
        return {"k": constant(model, self.k)}


@dataclasses.dataclass(frozen=True)
class Layers(Part):
    """`layers:8,8,4`: one k for each MoE layer, the first behind the dense prefix first."""

    kind, form = "layers", "layers:8,8,4"
    k_L: tuple[int, ...]

    def __post_init__(self):
        require_counts(*self.k_L)

    @property
    def spec(self) -> str:
        """The text that parses to this part."""
        return "layers:" + ",".join(map(str, self.k_L))

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """Slots to keep in each layer; ValueError where the model has another number of MoE layers."""
        if len(self.k_L) != model.num_layers:
            raise ValueError(
                f"{len(self.k_L)} layers; wanted one number for each of the model's {model.num_layers} MoE layers"
            )
        return {"k": np.asarray(self.k_L, np.int32)}


@dataclasses.dataclass(frozen=True)
class Schedule(Part):
    """`schedule:b,h,e,p`: b experts in the first MoE layer, h in layer p, e in the last, linear between.

    Layers count from 0 behind the dense prefix. What the line gives between its ends is rounded to the nearest whole
    number, halves up (*Faster MoE LLM Inference for Extremely Large Models*, arXiv 2505.03531, whose letters these are;
    it does not say how it rounds).
    """

    kind, form = "schedule", "schedule:6,8,4,2"
    b: int
    h: int
    e: int
    p: int

    def __post_init__(self):
        require_counts(self.b, self.h, self.e, self.p)

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """Slots to keep in each layer; ValueError where layer p is not between the first and the last."""
        last = model.num_layers - 1
        if self.p >= last:
            raise ValueError(f"p = {self.p}; wanted a layer between the first MoE layer, 0, and the last, {last}")
        k_L = np.interp(np.arange(model.num_layers), (0, self.p, last), (self.b, self.h, self.e))
        return {"k": np.floor(k_L + 0.5).astype(np.int32)}
