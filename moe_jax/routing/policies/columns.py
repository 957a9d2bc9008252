"""The columns that a kind sets, one number per MoE layer, and the facts of a model that it needs for them."""

import math
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.routing.calibration import Calibration

PerLayer = tuple[float, ...]  # one number for all MoE layers, or one for each
Columns = tuple[np.ndarray, ...]  # each [L], in the order of `Kind.sets`


class ModelFacts(NamedTuple):
    """The facts that a policy needs of the model that it is bound to."""

    num_layers: int  # MoE layers
    num_experts: int
    k: int  # experts per token that it was trained with
    normalize: bool  # whether its mixing weights sum to one
    calibration: Calibration | None = None
    k_of_layers: tuple[int, ...] = ()  # if it was trained with a different k per layer

    @property
    def own_k_L(self) -> np.ndarray:
        """int32 [L]: the number of experts that each layer was trained with."""
        return np.array(self.k_of_layers or (self.k,) * self.num_layers, np.int32)

    def calibrated(self) -> Calibration:
        """The calibration; ValueError if there is none."""
        if self.calibration is None:
            raise ValueError("expected policy.calibration, a file that `launch/calibrate.py` writes for this model")
        return self.calibration


def model_facts(architecture: Architecture, calibration: Calibration | None) -> ModelFacts:
    """Collects the facts that policies need.

    Raises:
        ValueError: the calibration is of a model with another number of layers or experts.
    """
    moe, num_layers = architecture.moe, architecture.decoder.num_moe_layers
    if calibration is not None and calibration.similarity_LEE.shape != (num_layers, moe.num_experts, moe.num_experts):
        raise ValueError("policy.calibration is of a model with other layers or experts")
    return ModelFacts(num_layers, moe.num_experts, moe.k, moe.normalize, calibration, moe.k_of_layers)


def require_counts(*values: int) -> None:
    """Refuses numbers of experts below 1 or beyond int32."""
    if min(values) < 1 or max(values) >= 2**31:
        raise ValueError("expected whole numbers of at least 1")


def require_between(low: float, high: float, values: PerLayer) -> None:
    """Refuses numbers outside an interval, ends included, or not finite."""
    if not all(low <= value <= high and math.isfinite(value) for value in values):
        raise ValueError(f"expected numbers from {low:g}" + (f" to {high:g}" if math.isfinite(high) else " on"))


def constant(model: ModelFacts, value: int | float, dtype: type = np.int32) -> np.ndarray:
    """[L]: the same setting in every layer."""
    return np.full(model.num_layers, value, dtype)


def per_layer(model: ModelFacts, values: PerLayer) -> np.ndarray:
    """float32 [L], from one number for all layers or one for each.

    Raises:
        ValueError: the number of values is neither one nor L.
    """
    if len(values) not in (1, model.num_layers):
        raise ValueError(
            f"{len(values)} numbers; expected one, or one for each of the model's {model.num_layers} MoE layers"
        )
    return np.broadcast_to(np.asarray(values, np.float32), model.num_layers)
