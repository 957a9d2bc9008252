"""Dispatch by all_to_all: every device sends each other device a block of rows, and gets their results back.

Blocks are of one size, fixed when compiled, `Dispatch.capacity` times the even share of all slots: what travels shrinks
with k_max, not with the slots that are kept. Rows that do not fit in the first exchange are dropped and counted, or
travel in further ones: as many as the fullest block needs, none if all fit. Every device takes part in all of them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.contract import Counts, Dispatch, Experts
from moe_jax.dispatch.local import gather_columns, own_columns, run_experts, scatter_columns
from moe_jax.dispatch.plan import plan
from moe_jax.kernels.combine.api import combine, spread
from moe_jax.routing.selection import Selection

SPLIT = True


def block_rows(num_tokens: int, k_max: int, own_experts: int, how: Dispatch) -> int:
    """Rows of a block: from the N of one device, K, and the experts of one device."""
    even = how.capacity * num_tokens * k_max / how.expert_shards
    return min(math.ceil(even), num_tokens * min(k_max, own_experts))


def run(
    x_local_ND: jax.Array, selection: Selection, experts: Experts, kernel: str, how: Dispatch
) -> tuple[jax.Array, Counts]:
    """As `api.dispatch`, inside `shard_map`."""
    shards, own_experts = how.expert_shards, experts.down_LEDF.shape[1]
    room = block_rows(*selection.expert_NK.shape, own_experts, how)
    order = plan(selection, shards * own_experts)
    with jax.named_scope("dispatch"):
        rows_SD = spread(x_local_ND, order.token_S, order.position_NK)
        sizes = lax.all_gather(order.group_sizes_E, how.expert_axes)  # [shards, E]: of each sender and expert
    exchange = functools.partial(_exchange, kernel=kernel, how=how, room=room)
    out_SD = exchange(rows_SD, *experts, sizes, 0)
    to_shard = order.group_sizes_E.reshape(shards, own_experts).sum(axis=1)
    overflow, exchanges = jnp.maximum(to_shard - room, 0).sum(), jnp.int32(1)
    if not how.drop:
        overflow, exchanges = jnp.int32(0), lax.pmax((to_shard.max() + room - 1) // room, how.row_axes)
        out_SD = out_SD + _further(exchange, rows_SD, *experts, sizes, exchanges)
    with jax.named_scope("combine"):
        y_local_ND = combine(out_SD, selection.weight_NK, order.token_S, order.position_NK)
    load_E = own_columns(sizes, how).sum(axis=0)
    sent = jnp.maximum(exchanges, 1) * (shards - 1) * room
    return y_local_ND, Counts(lax.psum(load_E, how.other_axes), *lax.psum((overflow, sent), how.row_axes))


@jax.custom_vjp
def move(rows_SD: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row i of the result is rows_SD[source[i]], or zero if there is none; no row is taken twice.

    `target` is the inverse, the place of each of rows_SD in the result, with which the gradient is a gather as well. An
    index past the end stands for none.
    """
    return rows_SD.at[source].get(mode="fill", fill_value=0)


move.defvjp(
    lambda rows_SD, source, target: (move(rows_SD, source, target), (source, target)),
    lambda places, grad: (move(grad, *reversed(places)), None, None),
)


def _exchange(rows_SD, gate_up_LEIFD, down_LEDF, layer, sizes, number, *, kernel, how, room):
    """Exchange `number`: out_SD of the rows that travel in it, zero for others. D is spread over `tensor`."""
    source, target_S = _blocks(sizes[lax.axis_index(how.expert_axes)], len(rows_SD), number, room, how)
    position, origin, group_sizes_E = _arrived(sizes, down_LEDF.shape[1], number, room, how)
    swap = functools.partial(lax.all_to_all, axis_name=how.expert_axes, split_axis=0, concat_axis=0, tiled=True)
    with jax.named_scope("dispatch"):
        arrived = move(swap(move(rows_SD, source, target_S)), origin, position)
        arrived = gather_columns(arrived, how)
    out = run_experts(arrived, group_sizes_E, Experts(gate_up_LEIFD, down_LEDF, layer), kernel)
    with jax.named_scope("combine"):
        out = scatter_columns(out, how)
        return move(swap(move(out, position, origin)), target_S, source)


def _blocks(sizes_E, num_rows, number, room, how):
    """The sorted row at each place of the blocks to send, and the place of each sorted row; past the end: none."""
    size = sizes_E.reshape(how.expert_shards, -1).sum(axis=1)
    last = jnp.cumsum(size)
    first = last - size
    place = number * room + jnp.arange(room, dtype=jnp.int32)[None]  # among all rows for a shard
    source = jnp.where(place < size[:, None], first[:, None] + place, num_rows)
    row_S = jnp.arange(num_rows, dtype=jnp.int32)
    shard_S = jnp.searchsorted(last, row_S, side="right")
    place_S = row_S - first.at[shard_S].get(mode="clip") - number * room
    held_S = (row_S < last[-1]) & (place_S >= 0) & (place_S < room)
    return source.reshape(-1), jnp.where(held_S, shard_S * room + place_S, how.expert_shards * room)


def _arrived(sizes, own_experts, number, room, how):
    """For the rows that arrive: their places sorted by expert, the inverse, and how many each expert gets."""
    mine = own_columns(sizes, how)
    last = jnp.cumsum(mine, axis=1)
    begin, end = (jnp.clip(edge - number * room, 0, room) for edge in (last - mine, last))  # within each block
    now = end - begin  # [shards, E]
    by_expert = now.T.reshape(-1)
    start = (jnp.cumsum(by_expert) - by_expert).reshape(own_experts, how.expert_shards).T
    place = jnp.arange(room, dtype=jnp.int32)[None]
    expert = (place[:, :, None] >= end[:, None, :]).sum(axis=2)  # [shards, room]; own_experts: no row
    sender = jnp.arange(how.expert_shards)[:, None]
    moved = (start - begin).at[sender, expert].get(mode="clip")
    total = how.expert_shards * room
    position = jnp.where(expert < own_experts, moved + place, total).reshape(-1)
    origin = jnp.full(total, total, jnp.int32).at[position].set(jnp.arange(total, dtype=jnp.int32), mode="drop")
    return position, origin, now.sum(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(exchange: Callable, rows_SD, gate_up_LEIFD, down_LEDF, layer, sizes, exchanges):
    """The sum of exchanges 1, 2 .. up to `exchanges`, which is data. The gradient runs each of them again."""

    def add(number, out_SD):
        return out_SD + exchange(rows_SD, gate_up_LEIFD, down_LEDF, layer, sizes, number)

    return lax.fori_loop(1, exchanges, add, jnp.zeros_like(rows_SD))


def _further_forward(exchange, *operands):
    return _further(exchange, *operands), operands


def _further_backward(exchange, operands, out_grad_SD):
    *inputs, layer, sizes, exchanges = operands

    def add(number, grads):
        _, pull = jax.vjp(lambda *inputs: exchange(*inputs, layer, sizes, number), *inputs)
        return jax.tree.map(jnp.add, grads, list(pull(out_grad_SD)))

    grads = lax.fori_loop(1, exchanges, add, jax.tree.map(jnp.zeros_like, inputs))
    return *grads, None, None, None


_further.defvjp(_further_forward, _further_backward)
