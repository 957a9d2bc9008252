"""Sorts the slots of a selection by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.selection import Selection

FEW_SLOTS = 2048  # up to this many slots, a cumulative sum of one-hot rows is faster than a sort


class Plan(NamedTuple):
    """Slots sorted by expert, dropped ones last. Slot s of N * K belongs to token s // K."""

    token_S: jax.Array  # int32: the token of each sorted row
    position_NK: jax.Array  # int32: the sorted row of each slot
    group_sizes_E: jax.Array  # int32: kept slots of each expert


def plan(selection: Selection, num_experts: int) -> Plan:
    """Sorts the slots by expert, then by token, then by rank; dropped slots come last."""
    num_tokens, k_max = selection.expert_NK.shape
    num_slots = num_tokens * k_max
    expert_S = jnp.where(selection.keep_NK, selection.expert_NK, num_experts).reshape(num_slots)
    one_hot_SE = expert_S[:, None] == jnp.arange(num_experts + 1)[None, :]
    sizes = one_hot_SE.sum(axis=0, dtype=jnp.int32)  # dropped slots are the last group
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    if num_slots <= FEW_SLOTS:
        before_SE = jnp.cumsum(one_hot_SE, axis=0, dtype=jnp.int32) - 1 + (jnp.cumsum(sizes) - sizes)[None, :]
        position_S = jnp.where(one_hot_SE, before_SE, 0).sum(axis=1, dtype=jnp.int32)
        order_S = jnp.zeros_like(slots).at[position_S].set(slots, unique_indices=True)
    else:
        order_S = jnp.argsort(expert_S, stable=True).astype(jnp.int32)
        position_S = jnp.zeros_like(slots).at[order_S].set(slots, unique_indices=True)
    return Plan(order_S // k_max, position_S.reshape(num_tokens, k_max), sizes[:num_experts])
