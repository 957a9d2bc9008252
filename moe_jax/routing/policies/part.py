"""One part of a policy: a rule with its numbers, as a spec writes it and as columns of settings."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import numpy as np

from moe_jax.routing.calibration import Calibration

PerLayer = tuple[float, ...]  # one number for all MoE layers, or one for each


class Model(NamedTuple):
    """What a policy has to know of the model that it is bound to."""

    num_layers: int  # MoE layers
    num_experts: int
    k: int  # that it was trained with
    normalize: bool  # whether its mixing weights sum to one
    calibration: Calibration | None = None
    k_of_layers: tuple[int, ...] = ()  # where it was trained with another in each layer

    @property
    def own_k_L(self) -> np.ndarray:
        """int32 [L]: the number of experts that each layer was trained with."""
        return np.array(self.k_of_layers or (self.k,) * self.num_layers, np.int32)


@dataclasses.dataclass(frozen=True)
class Part:
    """Base of all parts: a dataclass whose fields are the numbers behind the colon.

    Fields without a default are written in order, the others as name=value where they differ from it.
    """

    kind: ClassVar[str]
    form: ClassVar[str]  # an example
    batch_aware: ClassVar[bool] = False  # what one row keeps depends on the rows beside it

    @property
    def spec(self) -> str:
        """The text that parses to this part."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
            if field.default is dataclasses.MISSING:
                words.append(text)
            elif value != field.default:
                words.append(f"{field.name}={text}")
        return ":".join([self.kind, ",".join(words)]) if words else self.kind

    def columns(self, model: Model) -> dict[str, np.ndarray]:
        """The settings of each MoE layer, [L], by name; ValueError where they do not fit the model."""
        raise NotImplementedError


def require_counts(*values: int) -> None:
    """Refuses numbers of experts below 1, or that no model has."""
    if min(values) < 1 or max(values) >= 2**31:
        raise ValueError("wanted whole numbers of at least 1")


def require_between(low: float, high: float, values: PerLayer) -> None:
    """Refuses numbers outside an interval, ends included, or not finite."""
    if not all(low <= value <= high and math.isfinite(value) for value in values):
        raise ValueError(f"wanted numbers from {low:g}" + (f" to {high:g}" if math.isfinite(high) else " on"))


def constant(model: Model, value: int | float, dtype: type = np.int32) -> np.ndarray:
    """[L]: the same setting in every layer."""
    return np.full(model.num_layers, value, dtype)


def per_layer(model: Model, values: PerLayer) -> np.ndarray:
    """float32 [L] of one number for all layers, or one for each.

    Raises:
        ValueError: there are neither one nor L.
    """
    if len(values) not in (1, model.num_layers):
        raise ValueError(
            f"{len(values)} numbers; wanted one, or one for each of the model's {model.num_layers} MoE layers"
        )
    return np.broadcast_to(np.asarray(values, np.float32), model.num_layers)
