"""Sorts the slots of a selection by expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.routing.selection import Selection

MOST_COMPARED = 2048  # slots; up to here a GPU or TPU compares every two, in two small kernels; a CPU always sorts


class Plan(NamedTuple):
    """Slots sorted by expert, dropped ones last. Slot s of N * K belongs to token s // K."""

    token_S: jax.Array  # int32: the token of each sorted row
    position_NK: jax.Array  # int32: the sorted row of each slot
    group_sizes_E: jax.Array  # int32: kept slots of each expert


def plan(selection: Selection, num_experts: int) -> Plan:
    """Sorts the slots by expert, then by token, then by rank; dropped slots come last."""
    num_tokens, k_max = selection.expert_NK.shape
    expert_S = jnp.where(selection.keep_NK, selection.expert_NK, num_experts).reshape(num_tokens * k_max)
    sizes_E = (expert_S[:, None] == jnp.arange(num_experts)[None, :]).sum(axis=0, dtype=jnp.int32)
    on_chip = compare if len(expert_S) <= MOST_COMPARED else sort
    order_S, position_S = lax.platform_dependent(expert_S, cpu=sort, default=on_chip)
    return Plan(order_S // k_max, position_S.reshape(num_tokens, k_max), sizes_E)


def sort(expert_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the slots by expert, the place of each slot among them), int32; slots of one expert keep their order."""
    order_S = jnp.argsort(expert_S, stable=True).astype(jnp.int32)
    slots = jnp.arange(len(expert_S), dtype=jnp.int32)
    return order_S, jnp.zeros_like(slots).at[order_S].set(slots, unique_indices=True)


def compare(expert_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `sort`, by two sums: a chip runs each as one kernel."""
    slots = jnp.arange(len(expert_S), dtype=jnp.int32)
    key_S = expert_S * len(expert_S) + slots
    position_S = (key_S[None, :] < key_S[:, None]).sum(axis=1, dtype=jnp.int32)
    order_S = jnp.where(position_S[None, :] == slots[:, None], slots[None, :], 0).sum(axis=1, dtype=jnp.int32)
    return order_S, position_S
