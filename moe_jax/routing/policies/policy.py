"""A policy, not yet bound to a model: parts of different kinds, and the number of experts that they keep."""

import dataclasses

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.columns import ModelFacts, model_facts
from moe_jax.routing.policies.kind import Kind, StepWise


@dataclasses.dataclass(frozen=True)
class Policy:
    """A parsed spec: parts that set different columns."""

    parts: tuple[Kind, ...]
    # Of the model that it will be bound to, if a part needs one; not compared.
    calibration: Calibration | None = dataclasses.field(default=None, compare=False)

    @property
    def spec(self) -> str:
        """The text that parses to this policy."""
        return "+".join(part.spec for part in self.parts)

    @property
    def batch_aware(self) -> bool:
        """Whether what a row keeps in a decode step depends on the other rows."""
        return any(isinstance(part, StepWise) for part in self.parts)

    def columns(self, model: ModelFacts) -> dict[str, np.ndarray]:
        """The columns that the parts set, [L] each, by name.

        Raises:
            ValueError: a part does not fit the model.
        """
        columns = {}
        for part in self.parts:
            try:
                columns |= zip(part.sets, part.columns(model), strict=True)
            except ValueError as error:
                raise ValueError(f"policy {self.spec!r}: {part.spec}: {error}") from error
        return columns


def fixed_k(policy: Policy, architecture: Architecture) -> np.ndarray | None:
    """int32 [L]: the number of slots that the policy keeps for every token; None if that depends on the token.

    Raises:
        ValueError: the policy does not fit the model.
    """
    model = model_facts(architecture, policy.calibration)
    columns = {"k": model.own_k_L} | policy.columns(model)
    k_L = columns.pop("k")
    return None if columns else k_L


def uniform_k(policy: Policy, architecture: Architecture) -> int | None:
    """`fixed_k` as one number, if it is the same for all layers; else None.

    Raises:
        ValueError: the policy does not fit the model.
    """
    k_L = fixed_k(policy, architecture)
    return int(k_L[0]) if k_L is not None and (k_L == k_L[0]).all() else None


def with_own(policy: Policy, architecture: Architecture) -> Architecture | None:
    """The architecture with the policy's number of slots as its own k; None if that depends on the token.

    Raises:
        ValueError: the policy does not fit the model.
    """
    k_L = fixed_k(policy, architecture)
    if k_L is None:
        return None
    if k_L.max() <= architecture.moe.num_experts:  # else the architecture refuses it
        k_L = np.minimum(k_L, architecture.num_experts_L)  # a layer with fewer experts keeps all
    k_of_layers = () if (k_L == k_L[0]).all() else tuple(map(int, k_L))
    moe = dataclasses.replace(architecture.moe, k=int(k_L.max()), k_of_layers=k_of_layers)
    return dataclasses.replace(architecture, moe=moe)
