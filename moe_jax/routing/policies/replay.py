"""Routing that was recorded, in place of what a policy chooses: for measuring steps, see `study/`."""

from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from moe_jax.routing.policies.binding import Settings
from moe_jax.routing.selection import Routing, Slots


class Replayed(NamedTuple):
    """Settings under which given experts stand in the slots of one step's tokens. Stands wherever `Settings` do.

    The experts get the mixing weights that the router gives them. The router and the policy choose all the same: a
    replayed step costs what the model's own costs.
    """

    settings: Settings
    expert_LNK: jax.Array  # int32; -1: the router's own choice, kept as the policy says
    keep_LNK: jax.Array | None = None  # bool; None: as the policy says

    def of_tokens(self, part: Callable[[jax.Array], jax.Array]) -> Self:
        """The settings of a part of the step's tokens; `part` takes that part out of an [L, N, K]."""
        return Replayed(self.settings, *jax.tree.map(part, (self.expert_LNK, self.keep_LNK)))

    def in_slots(self, slots: Slots, routing: Routing, layer: jax.Array) -> Slots:
        """The slots of one layer with the given experts in them."""
        slots_K = slice(slots.expert_NK.shape[1])  # a layer with few experts has no more
        given_NK = self.expert_LNK[layer][:, slots_K]
        expert_NK = jnp.where(given_NK >= 0, given_NK, slots.expert_NK)
        keep_NK = slots.keep_NK if self.keep_LNK is None else self.keep_LNK[layer][:, slots_K]
        return Slots(expert_NK, jnp.take_along_axis(routing.mix_NE, expert_NK, axis=1), keep_NK)
