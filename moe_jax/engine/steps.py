"""The programs that the engine compiles: prefill (prompts to a prefix), insert (prefix to slots) and decode.

A prefix has the type of slots, so if all prompts are read together it is used as the slots and nothing is copied.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.engine import cache as caches
from moe_jax.engine.sampling import Sampling, sample_tokens
from moe_jax.model import decoder, dtypes
from moe_jax.model.attention import Cache
from moe_jax.model.sharding import Layout, whole
from moe_jax.routing import policies


class Live(NamedTuple):
    """The live settings of a batch, one row per request."""

    policy: policies.Settings | policies.Replayed
    sampling: Sampling


class CacheSlots(NamedTuple):
    """Sequences that are decoded together: the attention cache and the state of each."""

    cache: Cache
    token_B: jax.Array  # int32: the token sampled last, which the model has not read yet
    position_B: jax.Array  # int32: the position of that token
    left_B: jax.Array  # int32: tokens that may still be sampled; 0: finished, or no request


class PrefillResult(NamedTuple):
    """What `prefill` returns to the host."""

    token_B: jax.Array  # int32
    log_probability_B: jax.Array  # float32
    kept_B: jax.Array  # int32: expert slots that the tokens of each row kept, summed over MoE layers
    distinct: jax.Array  # int32 scalar: experts that at least one row kept, summed over MoE layers
    overflow: jax.Array  # int32 scalar: kept slots that were not computed, summed over MoE layers
    chosen_LNK: jax.Array | None  # int32: the expert of each slot, -1 if not kept; None unless `routing`


class DecodeResult(NamedTuple):
    """What `decode` returns to the host: as `PrefillResult`, one row per step, of which `count` are valid."""

    count: jax.Array  # int32 scalar
    alive_SB: jax.Array  # bool: whether the row took the step
    token_SB: jax.Array
    log_probability_SB: jax.Array
    kept_SB: jax.Array
    distinct_S: jax.Array
    overflow_S: jax.Array
    chosen_SLBK: jax.Array | None


def shardings_of(slots: CacheSlots, layout: Layout) -> CacheSlots:
    """Where slots lie on a mesh: rows of the cache over the data axis; the rest is whole on every device."""
    cache = Cache(*(x if x is None else layout.of_letters(letters) for x, letters in zip(slots.cache, caches.LETTERS)))
    return CacheSlots(cache, *[layout.replicated] * (len(slots) - 1))


def placed(slots: CacheSlots, layout: Layout | None) -> CacheSlots:
    """Slots as `shardings_of` says, in a compiled function; unchanged without a layout."""
    return slots if layout is None else lax.with_sharding_constraint(slots, shardings_of(slots, layout))


@functools.partial(jax.jit, static_argnames=("execution", "memory", "chunk", "routing"))
def prefill(params, tokens_BT, length_B, budget_B, end_I, live: Live, *, execution, memory, chunk, routing):
    """Reads prompts into a prefix, and samples the first token of each.

    Args:
        params: as `decoder.split` returns them.
        tokens_BT: int32 ids, padded at the end; T is at most `chunk`, or a multiple of it.
        length_B: int32, tokens of each prompt; 0: no prompt.
        budget_B: int32, tokens that each may sample, including this one; 0 if there is no prompt.
        end_I: int32, tokens that end a text.
        live: settings of the rows.
        execution: static.
        memory: cache positions of the prefix, static.
        chunk: positions that are read at once, static.
        routing: whether to return `PrefillResult.chosen_LNK`, static.

    Returns:
        `PrefillResult`, and the prefix as `CacheSlots`.
    """
    batch, length = tokens_BT.shape
    layout = execution.layout
    cache = caches.allocate(
        execution.architecture, batch, memory, dtypes.dtype_of(params), layout, execution.channel_multiple
    )
    valid_BT = jnp.arange(length)[None, :] < length_B[:, None]
    last_B = jnp.maximum(length_B - 1, 0)
    with jax.named_scope("prefill"):
        if length > chunk:
            read = _in_chunks(params, cache, tokens_BT, last_B, valid_BT, live.policy, execution, chunk)
        else:
            x_BTD, cache, use = decoder.extend(params, cache, tokens_BT, None, valid_BT, live.policy, execution)
            read = x_BTD[jnp.arange(batch), last_B], use.chosen_NK, use.load_E, use.overflow, cache
    last_BD, chosen_LNK, load_LE, overflow_L, cache = read
    token_B, log_probability_B = _sample(params, last_BD, length_B, live, execution)
    kept_B = _kept(chosen_LNK.reshape(len(chosen_LNK), batch, -1))
    counts = kept_B, _distinct(load_LE), overflow_L.sum()
    result = PrefillResult(token_B, log_probability_B, *counts, chosen_LNK if routing else None)
    slots = CacheSlots(cache, token_B, length_B, _left(budget_B, token_B, end_I))
    return whole(result, layout), placed(slots, layout)


def _in_chunks(params, cache, tokens_BT, last_B, valid_BT, policy, execution, chunk):
    """Reads prompts chunk by chunk up to the end of the longest, in a loop: the program does not grow with them.

    Returns:
        The last x_BD of each prompt, chosen_LNK, load_LE, overflow_L and the cache.
    """
    batch, length = tokens_BT.shape
    trunk = execution.architecture.decoder
    layers = trunk.num_moe_layers

    def read(index, so_far):
        cache, last_BD, chosen_LBTK, load_LE, overflow_L = so_far
        first = index * chunk
        tokens, valid = (lax.dynamic_slice_in_dim(x_BT, first, chunk, axis=1) for x_BT in (tokens_BT, valid_BT))

        def slice_chunk(x_LNK):
            x_LBTK = x_LNK.reshape(layers, batch, length, -1)
            return lax.dynamic_slice_in_dim(x_LBTK, first, chunk, axis=2).reshape(layers, batch * chunk, -1)

        start_B = jnp.full(batch, first, jnp.int32)
        x_BTD, cache, use = decoder.extend(
            params, cache, tokens, start_B, valid, policy.slice_tokens(slice_chunk), execution
        )
        place_B = last_B - first
        ends_here_B = (place_B >= 0) & (place_B < chunk)
        ended_BD = x_BTD[jnp.arange(batch), jnp.clip(place_B, 0, chunk - 1)]
        chosen = use.chosen_NK.reshape(layers, batch, chunk, -1)
        chosen_LBTK = lax.dynamic_update_slice_in_dim(chosen_LBTK, chosen, first, axis=2)
        last_BD = jnp.where(ends_here_B[:, None], ended_BD, last_BD)
        return cache, last_BD, chosen_LBTK, load_LE + use.load_E, overflow_L + use.overflow

    last_BD = jnp.zeros((batch, trunk.d_model), dtypes.dtype_of(params))
    chosen_LBTK = jnp.full((layers, batch, length, execution.k_max), -1, jnp.int32)
    load_LE = jnp.zeros((layers, execution.architecture.moe.num_experts), jnp.int32)
    count = last_B.max() // chunk + 1
    start = cache, last_BD, chosen_LBTK, load_LE, jnp.zeros(layers, jnp.int32)
    cache, last_BD, chosen_LBTK, *counts = lax.fori_loop(0, count, read, start)
    return last_BD, chosen_LBTK.reshape(layers, batch * length, -1), *counts, cache


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="slots")
def insert(slots: CacheSlots, prefix: CacheSlots, place_B, count, *, layout=None) -> CacheSlots:
    """Copies the first `count` rows of a prefix into slots: row r overwrites slot `place_B[r]`."""

    def insert_row(row, slots):
        def copy(all_slots, all_rows):
            new = lax.dynamic_slice_in_dim(all_rows, row, 1, axis=1)
            return lax.dynamic_update_slice_in_dim(all_slots, new, place_B[row], axis=1)

        cache = Cache(*(x if x is None else copy(x, new) for x, new in zip(slots.cache, prefix.cache)))
        return CacheSlots(cache, *(x_B.at[place_B[row]].set(new_B[row]) for x_B, new_B in zip(slots[1:], prefix[1:])))

    return placed(lax.fori_loop(0, count, insert_row, slots), layout)


@functools.partial(jax.jit, static_argnames=("execution", "most", "routing"), donate_argnames="slots")
def decode(params, slots: CacheSlots, continue_B, count, end_I, live: Live, *, execution, most, routing):
    """Takes up to `count` decode steps: reads the last token of each unfinished row and samples the next.

    Stops early once all rows are finished. If `most` is 1, the program has no loop and takes one step.

    Args:
        params: as `decoder.split` returns them.
        slots: updated in place.
        continue_B: bool; False finishes a row.
        count: int32 scalar, at most `most`.
        end_I: int32, tokens that end a text.
        live: settings of the rows; recorded routing covers all steps, one after the other.
        execution: static.
        most: steps that `DecodeResult` has room for, static.
        routing: whether to return `DecodeResult.chosen_SLBK`, static.

    Returns:
        `DecodeResult`, and the slots.
    """
    architecture, batch = execution.architecture, len(continue_B)
    slots = slots._replace(left_B=jnp.where(continue_B, slots.left_B, 0))

    def is_unfinished(state):
        steps, slots = state
        return (steps.count < count) & (slots.left_B > 0).any()

    def step(state):
        steps, slots = state
        alive_B = slots.left_B > 0
        policy = live.policy.slice_tokens(
            lambda x_LNK: lax.dynamic_slice_in_dim(x_LNK, steps.count * batch, batch, axis=1)
        )
        with jax.named_scope("decode"):
            x_BTD, cache, use = decoder.extend(
                params, slots.cache, slots.token_B[:, None], slots.position_B, alive_B[:, None], policy, execution
            )
        sampled_B, log_probability_B = _sample(params, x_BTD[:, 0], slots.position_B + 1, live, execution)
        chosen_LBK = use.chosen_NK
        new = (alive_B, sampled_B, log_probability_B, _kept(chosen_LBK), _distinct(use.load_E), use.overflow.sum())
        new += (chosen_LBK if routing else None,)
        recorded = jax.tree.map(lambda all_S, own: all_S.at[steps.count].set(own), tuple(steps[1:]), new)
        token_B = jnp.where(alive_B, sampled_B, slots.token_B)
        left_B = _left(slots.left_B, sampled_B, end_I)
        return DecodeResult(steps.count + 1, *recorded), CacheSlots(cache, token_B, slots.position_B + alive_B, left_B)

    layers, k_max = architecture.decoder.num_moe_layers, execution.k_max
    steps = DecodeResult(
        jnp.int32(0),
        jnp.zeros((most, batch), bool),
        jnp.zeros((most, batch), jnp.int32),
        jnp.zeros((most, batch), jnp.float32),
        jnp.zeros((most, batch), jnp.int32),
        jnp.zeros(most, jnp.int32),
        jnp.zeros(most, jnp.int32),
        jnp.full((most, layers, batch, k_max), -1, jnp.int32) if routing else None,
    )
    steps, slots = step((steps, slots)) if most == 1 else lax.while_loop(is_unfinished, step, (steps, slots))
    return whole(steps, execution.layout), placed(slots, execution.layout)


def _sample(params, x_BD, position_B, live, execution):
    with jax.named_scope("sample"):
        logits_BV = decoder.logits(params, x_BD, execution.kernels.projection)
        return sample_tokens(logits_BV, live.sampling, position_B)


def _left(left_B, sampled_B, end_I):
    ended_B = (sampled_B[:, None] == end_I[None, :]).any(axis=1)
    return jnp.where(ended_B, 0, jnp.maximum(left_B - 1, 0))


def _kept(chosen_LBK):
    return (chosen_LBK >= 0).sum(axis=(0, 2), dtype=jnp.int32)


def _distinct(load_LE):
    return (load_LE > 0).sum(dtype=jnp.int32)
