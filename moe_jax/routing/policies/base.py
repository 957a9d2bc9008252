"""What a policy is: a spec that a user writes, and live settings that one compiled step takes as arrays."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing.selection import Routing, Selection, top_slots, weigh


class Policy(Protocol):
    """A parsed spec, before it meets a model."""

    @property
    def spec(self) -> str:
        """The text that parses to this policy."""

    def experts_per_layer(self, num_layers: int, k: int) -> np.ndarray:
        """int32 [L]: slots to keep in each MoE layer of a model trained with `k`; ValueError where it does not fit."""


class Settings(NamedTuple):
    """The live half of a policy: one row per request, one column per MoE layer."""

    k_BL: jax.Array  # int32: slots to keep
    replay_LNK: jax.Array | None = None  # int32: experts of this step's tokens, best first; -1: the router's own choice


class Context(NamedTuple):
    """Where a selection is made."""

    layer: jax.Array  # int32 scalar: column of the settings
    row_N: jax.Array  # int32: request of each token
    valid_N: jax.Array  # bool: False for padding and finished rows, which keep nothing


def settings(policies: Sequence[Policy], num_layers: int, k: int, k_max: int) -> Settings:
    """Binds one policy per request to a model.

    Raises:
        ValueError: a policy asks for fewer than 1 or more than `k_max` experts, or for another number of layers.
    """
    rows = []
    for policy in policies:
        row = policy.experts_per_layer(num_layers, k)
        if row.min() < 1 or row.max() > k_max:
            raise ValueError(
                f"policy.spec = {policy.spec!r}: wanted 1 to {k_max} experts in every layer; more need a larger "
                "policy.k_max"
            )
        rows.append(row)
    return Settings(jnp.asarray(np.stack(rows), jnp.int32))


def select(routing: Routing, live: Settings, context: Context, moe: MoEConfig, k_max: int) -> Selection:
    """Keeps the first k slots of each valid token, k being its request's setting for the layer.

    Where routing is replayed, the given experts stand in the slots instead of the best ones, at the mixing weights that
    the router gives them. The router chooses all the same: a replayed step costs what the model's own costs.
    """
    expert_NK, mix_NK = top_slots(routing, k_max)
    if live.replay_LNK is not None:
        replayed_NK = live.replay_LNK[context.layer]
        expert_NK = jnp.where(replayed_NK >= 0, replayed_NK, expert_NK)
        mix_NK = jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1)
    k_N = live.k_BL[context.row_N, context.layer]
    keep_NK = (jnp.arange(k_max)[None, :] < k_N[:, None]) & context.valid_N[:, None]
    return weigh(expert_NK, mix_NK, keep_NK, moe)
