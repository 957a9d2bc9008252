"""Dispatch by ragged_all_to_all: only kept slots are sent, so that what travels halves with the experts per token.

A row lands where it belongs among the rows of its receiver, sorted by expert, so nothing is sorted there. The receiver
has room for the worst case, every token sending it all that it can, or with `Dispatch.drop` for `capacity` times the
even share; rows that find no room are counted.

XLA has no ragged_all_to_all for CPUs. On a mesh of CPUs the same rows come to the same places by an all_gather, which
shows what is sent and is no way to run.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.contract import Counts, Dispatch, Experts
from moe_jax.dispatch.local import gather_columns, own_columns, run_experts, scatter_columns
from moe_jax.dispatch.plan import plan
from moe_jax.kernels.combine.api import combine, spread
from moe_jax.routing.selection import Selection

SPLIT = True


class Routes(NamedTuple):
    """Where the rows of each sender for each expert are and go: int32 [shards, E], the same on all shards."""

    begin: jax.Array  # the first among the sender's rows
    arrive: jax.Array  # the place of the first among the receiver's rows
    sent: jax.Array  # rows that are sent


def received_rows(num_tokens: int, k_max: int, own_experts: int, how: Dispatch) -> int:
    """The rows that a device has room for: from the N of one device, K, and the experts of one device."""
    most = how.expert_shards * num_tokens * min(k_max, own_experts)
    return min(most, math.ceil(how.capacity * num_tokens * k_max)) if how.drop else most


def routes_of(sizes: jax.Array, room: int) -> Routes:
    """The routes from [shards, E], the kept slots of each sender and expert; rows lie by expert, then by sender."""
    shards, num_experts = sizes.shape
    to_receiver = sizes.T.reshape(shards, -1)  # of each receiver: by expert, then by sender
    arrive = (jnp.cumsum(to_receiver, axis=1) - to_receiver).reshape(num_experts, shards).T
    return Routes(jnp.cumsum(sizes, axis=1) - sizes, arrive, jnp.clip(room - arrive, 0, sizes))


def run(
    x_local_ND: jax.Array, selection: Selection, experts: Experts, kernel: str, how: Dispatch
) -> tuple[jax.Array, Counts]:
    """As `api.dispatch`, inside `shard_map`."""
    shards, own_experts = how.expert_shards, experts.down_LEDF.shape[1]
    room = received_rows(*selection.expert_NK.shape, own_experts, how)
    order = plan(selection, shards * own_experts)
    with jax.named_scope("dispatch"):
        sizes = lax.all_gather(order.group_sizes_E, how.expert_axes)
        routes = routes_of(sizes, room)
        rows_SD = spread(x_local_ND, order.token_S, order.position_NK)
        arrived = travel(rows_SD, routes, room, True, how)
        arrived = gather_columns(arrived, how)
    out = run_experts(arrived, own_columns(routes.sent, how).sum(axis=0), experts, kernel)
    with jax.named_scope("combine"):
        out = scatter_columns(out, how)
        out_SD = travel(out, routes, len(rows_SD), False, how)
        y_local_ND = combine(out_SD, selection.weight_NK, order.token_S, order.position_NK)
    me = lax.axis_index(how.expert_axes)
    load_E, from_me = own_columns(sizes, how).sum(axis=0), routes.sent[me]
    sent = from_me.sum() - own_columns(routes.sent, how)[me].sum()  # a device's own rows stay
    overflow = order.group_sizes_E.sum() - from_me.sum()
    return y_local_ND, Counts(lax.psum(load_E, how.other_axes), *lax.psum((overflow, sent), how.row_axes))


def is_emulated(how: Dispatch) -> bool:
    """Whether the mesh lacks the operation."""
    return how.mesh.devices.flat[0].platform == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def travel(rows_SD: jax.Array, routes: Routes, num_rows: int, there: bool, how: Dispatch) -> jax.Array:
    """Sends rows to the devices of their experts, or back.

    Args:
        rows_SD: the sender's rows sorted by expert, or on the way back the receiver's.
        routes: where rows are and go.
        num_rows: of the result, static.
        there: False: back.
        how: the mesh.

    Returns:
        The rows at their places; zero where none comes.
    """
    if is_emulated(how):
        return _gathered(rows_SD, routes, num_rows, there, how)
    me = lax.axis_index(how.expert_axes)
    by_sender = [table[me] for table in routes]  # an entry for each expert
    by_receiver = [own_columns(table, how).reshape(-1) for table in routes]  # for each sender and own expert
    (begin, arrive, sent), (_, _, received) = (by_sender, by_receiver) if there else (by_receiver, by_sender)
    if not there:
        begin, arrive = arrive, begin
    out = jnp.zeros((num_rows, rows_SD.shape[1]), rows_SD.dtype)
    return lax.ragged_all_to_all(rows_SD, out, begin, sent, arrive, received, axis_name=how.expert_axes)


def _gathered(rows_SD, routes, num_rows, there, how):
    """What `travel` gives, on a CPU: every row of the result looks up its origin among the rows of all devices."""
    shards, me = how.expert_shards, lax.axis_index(how.expert_axes)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    if there:  # tables for each own expert and sender
        begin, arrive, sent = (own_columns(table, how).T.reshape(-1) for table in routes)
        segment = jnp.minimum(jnp.searchsorted(arrive + sent, row, side="right"), len(sent) - 1)
        shard, first, start = segment % shards, begin[segment], arrive[segment]
    else:
        start, first, sent = (table[me] for table in routes)  # for each expert
        segment = jnp.searchsorted(start, row, side="right") - 1
        shard, first, start = segment // (len(sent) // shards), first[segment], start[segment]
    held = row - start < sent[segment]
    everyone = lax.all_gather(rows_SD, how.expert_axes)
    return jnp.where(held[:, None], everyone.at[shard, first + row - start].get(mode="clip"), 0)


def _travel_forward(rows_SD, routes, num_rows, there, how):
    return travel(rows_SD, routes, num_rows, there, how), (routes, len(rows_SD))


def _travel_backward(num_rows, there, how, residuals, grad):
    routes, rows_before = residuals
    return travel(grad, routes, rows_before, not there, how), None


travel.defvjp(_travel_forward, _travel_backward)
