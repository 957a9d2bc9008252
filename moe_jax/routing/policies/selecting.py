"""Applies policies in one MoE layer: from the router's output to the slots that are kept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing.policies import registry
from moe_jax.routing.policies.binding import Settings
from moe_jax.routing.policies.by_weight import by_weight
from moe_jax.routing.policies.kind import Kind, RowWise, StepWise
from moe_jax.routing.policies.renormalize import Renormalize, weigh
from moe_jax.routing.policies.replay import Replayed
from moe_jax.routing.policies.schedule import ModelOwn
from moe_jax.routing.selection import Routing, Selection, Slots, top_slots


class Context(NamedTuple):
    """The layer and the tokens of a selection."""

    layer: jax.Array  # int32 scalar: column of the settings
    row_N: jax.Array  # int32: request of each token
    valid_N: jax.Array  # bool: False for padding and finished rows, which keep nothing
    # the N = B * steps tokens are decode steps of B rows; 0: a prefill, in which no step-wise kind acts
    steps: int


def select(routing: Routing, live: Settings | Replayed, context: Context, moe: MoEConfig, k_max: int) -> Selection:
    """Selects the slots of each valid token, by its request's policy for this layer.

    Each token starts with its best k experts. The row-wise kinds drop slots; in a decode step, the step-wise kinds in
    use then act, in the order of the registry. Recorded experts, if any, replace the chosen ones. Finally the slots
    are weighted.
    """
    settings = live.settings if isinstance(live, Replayed) else live
    expert_NK, mix_NK = top_slots(routing, max(k_max, moe.k))
    own_sum_N = mix_NK[:, : moe.k].sum(axis=1)
    if settings.own_k_L is not None:
        is_own_K = jnp.arange(mix_NK.shape[1]) < settings.own_k_L[context.layer]
        own_sum_N = jnp.where(is_own_K[None, :], mix_NK, 0.0).sum(axis=1)

    def columns_N(kind: type[Kind]) -> list[jax.Array]:
        return [settings.columns_BL[name][context.row_N, context.layer] for name in kind.sets]

    [k_N], [rule_N] = columns_N(ModelOwn), columns_N(Renormalize)
    keep_NK = (jnp.arange(k_max)[None, :] < k_N[:, None]) & context.valid_N[:, None]
    slots = Slots(expert_NK[:, :k_max], mix_NK[:, :k_max], keep_NK)
    offered = by_weight(slots)
    for kind in registry.KINDS:
        if issubclass(kind, RowWise):
            keep_NK &= kind.keeps(offered, *columns_N(kind))
    slots = _step_wise(slots._replace(keep_NK=keep_NK), routing, settings, context)
    if isinstance(live, Replayed):
        slots = live.in_slots(slots, routing, context.layer)
    return weigh(slots, own_sum_N, rule_N, moe)


def _step_wise(slots: Slots, routing: Routing, settings: Settings, context: Context) -> Slots:
    """Applies the step-wise kinds in use to each decode step separately."""
    in_use = {
        kind: [settings.columns_BL[name][:, context.layer] for name in kind.sets]
        for kind in registry.KINDS
        if issubclass(kind, StepWise) and settings.columns_BL.keys() >= {*kind.sets}
    }
    if not context.steps or not in_use:
        return slots
    for kind, columns in in_use.items():
        if kind.name in settings.tables:
            columns.append(settings.tables[kind.name][context.layer])
    same_group_BB = settings.group_B[:, None] == settings.group_B[None, :]

    def one_step(slots: Slots, routing: Routing, valid_B: jax.Array) -> Slots:
        same_BB = same_group_BB & valid_B[:, None] & valid_B[None, :]
        for kind, columns in in_use.items():
            slots = kind.choose(slots, routing, same_BB, *columns)
        return slots

    if context.steps == 1:
        return one_step(slots, routing, context.valid_N)
    by_step = jax.tree.map(
        lambda value: value.reshape(-1, context.steps, *value.shape[1:]), (slots, routing, context.valid_N)
    )
    chosen = jax.vmap(one_step, in_axes=1, out_axes=1)(*by_step)
    return jax.tree.map(lambda value: value.reshape(-1, value.shape[-1]), chosen)
