"""Policies bound to a model: settings that a compiled step takes as arrays, so that they can change between steps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.routing.policies import registry
from moe_jax.routing.policies.columns import ModelFacts, model_facts
from moe_jax.routing.policies.kind import Kind, StepWise
from moe_jax.routing.policies.policy import Policy


class Settings(NamedTuple):
    """Settings of policies as arrays: one row per request, one column per MoE layer.

    The names are static. Settings of a step-wise kind are present only if some row uses it, all others always. A row
    whose policy does not use a kind has the kind's neutral settings.
    """

    columns_BL: dict[str, jax.Array]
    group_B: jax.Array  # int32: rows with the same number act together in step-wise kinds
    tables: dict[str, jax.Array]  # by the name of a kind, see `StepWise.table`
    own_k_L: jax.Array | None = None  # int32: the model's own k of each MoE layer, if they differ

    def slice_tokens(self, part: Callable[[jax.Array], jax.Array]) -> Self:
        """The settings for some of a step's tokens: the same, since they belong to requests. See `Replayed`."""
        return self


def settings(
    policies: Sequence[Policy],
    architecture: Architecture,
    k_max: int,
    group_B: Sequence[int] | np.ndarray | None = None,
) -> Settings:
    """Binds one policy per request to a model.

    Args:
        policies: the policy of each row.
        architecture: the model's architecture.
        k_max: static slots per token.
        group_B: rows with the same number act together in a decode step; None: those with the same policy.

    Raises:
        ValueError: a policy asks for fewer than 1 or more than `k_max` experts, for another number of layers, or for a
            calibration that is missing.
    """
    number_of = {policy: number for number, policy in enumerate(dict.fromkeys(policies))}
    models = {policy: model_facts(architecture, policy.calibration) for policy in number_of}
    columns = {policy: policy.columns(model) for policy, model in models.items()}
    present = [kind for kind in registry.KINDS if _is_present(kind, number_of)]
    model = models[policies[0]]
    neutral = {name: column_L for kind in present for name, column_L in zip(kind.sets, kind.neutral(model))}
    columns = {policy: neutral | own for policy, own in columns.items()}
    for policy, own in columns.items():
        if own["k"].max() > k_max:
            raise ValueError(
                f"policy {policy.spec!r}: expected 1 to {k_max} experts in every layer; more need a larger policy.k_max"
            )
    columns_BL = {name: jnp.asarray(np.stack([columns[policy][name] for policy in policies])) for name in neutral}
    if group_B is None:
        group_B = [number_of[policy] for policy in policies]
    tables = {kind.name: _table(kind, models) for kind in present if issubclass(kind, StepWise)}
    tables = {name: jnp.asarray(table) for name, table in tables.items() if table is not None}
    own_k_L = jnp.asarray(architecture.k_L, jnp.int32) if architecture.moe.k_of_layers else None
    return Settings(columns_BL, jnp.asarray(group_B, jnp.int32), tables, own_k_L)


def _is_present(kind: type[Kind], policies: Sequence[Policy]) -> bool:
    return not issubclass(kind, StepWise) or any(isinstance(part, kind) for policy in policies for part in policy.parts)


def _table(kind: type[StepWise], models: dict[Policy, ModelFacts]) -> np.ndarray | None:
    """The kind's table, from the calibration of the first policy that uses it."""
    return next(
        kind.table(model) for policy, model in models.items() if any(isinstance(part, kind) for part in policy.parts)
    )
