"""Recorded routing in place of a policy's choice, for timing steps."""

from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from moe_jax.routing.policies.binding import Settings
from moe_jax.routing.selection import Routing, Slots


class Replayed(NamedTuple):
    """Settings with given experts for the tokens of one step; usable wherever `Settings` are.

    The experts get the router's mixing weights. The router and the policy still run, so that a replayed step costs as
    much as the model's own.
    """

    settings: Settings
    expert_LNK: jax.Array  # int32; -1: the router's own choice
    keep_LNK: jax.Array | None = None  # bool; None: as the policy decides

    def slice_tokens(self, part: Callable[[jax.Array], jax.Array]) -> Self:
        """The settings for some of the step's tokens; `part` selects them from an [L, N, K]."""
        return Replayed(self.settings, *jax.tree.map(part, (self.expert_LNK, self.keep_LNK)))

    def in_slots(self, slots: Slots, routing: Routing, layer: jax.Array) -> Slots:
        """The slots of one layer, with the given experts."""
        slots_K = slice(slots.expert_NK.shape[1])  # a layer with few experts has fewer slots
        given_NK = self.expert_LNK[layer][:, slots_K]
        expert_NK = jnp.where(given_NK >= 0, given_NK, slots.expert_NK)
        keep_NK = slots.keep_NK if self.keep_LNK is None else self.keep_LNK[layer][:, slots_K]
        return Slots(expert_NK, jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1), keep_NK)
