"""Policies that fix the number of experts: by the model, one number for all layers, or one per layer."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ModelOwn:
    """`model`: the k that the model was trained with."""

    @property
    def spec(self) -> str:
        """The text that parses to this policy."""
        return "model"

    def experts_per_layer(self, num_layers: int, k: int) -> np.ndarray:
        """int32 [L], all k."""
        return np.full(num_layers, k, np.int32)


@dataclasses.dataclass(frozen=True)
class TopK:
    """`topk:k`: the same k in every MoE layer."""

    k: int

    @property
    def spec(self) -> str:
        """The text that parses to this policy."""
        return f"topk:{self.k}"

    def experts_per_layer(self, num_layers: int, k: int) -> np.ndarray:
        """int32 [L], all the policy's own k."""
        return np.full(num_layers, self.k, np.int32)


@dataclasses.dataclass(frozen=True)
class Layers:
    """`layers:8,8,4`: one k for each MoE layer, the first behind the dense prefix first."""

    k_L: tuple[int, ...]

    @property
    def spec(self) -> str:
        """The text that parses to this policy."""
        return "layers:" + ",".join(map(str, self.k_L))

    def experts_per_layer(self, num_layers: int, k: int) -> np.ndarray:
        """int32 [L]; ValueError where the model has another number of MoE layers."""
        if len(self.k_L) != num_layers:
            raise ValueError(
                f"policy.spec = {self.spec!r}: {len(self.k_L)} layers; wanted one number for each of the model's "
                f"{num_layers} MoE layers"
            )
        return np.asarray(self.k_L, np.int32)
