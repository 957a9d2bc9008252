"""What the engine compiles: reading prompts, in chunks where they are long, and decoding one token of every row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.engine import cache as caches
from moe_jax.engine.sampling import Sampling, draw
from moe_jax.model import decoder
from moe_jax.routing import policies


class Drawn(NamedTuple):
    """What a step hands to the host."""

    token_B: jax.Array  # int32
    log_probability_B: jax.Array  # float32
    chosen_LNK: jax.Array  # int32: the expert of each slot; -1: not kept


class Live(NamedTuple):
    """The live settings of a batch, one row per request."""

    policy: policies.Settings
    sampling: Sampling


@functools.partial(jax.jit, static_argnames=("execution", "memory", "chunk"))
def prefill(params, tokens_BT, length_B, valid_BT, live: Live, *, execution, memory, chunk):
    """Reads the prompts into a new cache, and draws the first token of each.

    Where T is larger than `chunk`, it is a multiple of it.
    """
    batch, length = tokens_BT.shape
    cache = caches.allocate(execution.architecture, batch, memory, decoder.dtype_of(params))
    with jax.named_scope("prefill"):
        if length > chunk:
            prompts = (tokens_BT, length_B, valid_BT)
            last_BD, chosen_LNK, cache = _in_chunks(params, cache, *prompts, live.policy, execution, chunk)
        else:
            x_BTD, cache, traffic = decoder.extend(params, cache, tokens_BT, None, valid_BT, live.policy, execution)
            last_BD, chosen_LNK = x_BTD[jnp.arange(batch), length_B - 1], traffic.chosen_NK
    return _draw(params, last_BD, length_B, chosen_LNK, live, execution), cache


def _in_chunks(params, cache, tokens_BT, length_B, valid_BT, policy, execution, chunk):
    """Reads chunk after chunk up to the end of the longest prompt: the last x_BD of each, chosen_LNK and the cache.

    A loop of the program, which is therefore no longer for longer prompts.
    """
    batch, length = tokens_BT.shape
    trunk = execution.architecture.decoder
    layers = trunk.num_moe_layers

    def read(index, so_far):
        cache, last_BD, chosen_LBTK = so_far
        first = index * chunk
        tokens, valid = (lax.dynamic_slice_in_dim(x_BT, first, chunk, axis=1) for x_BT in (tokens_BT, valid_BT))

        def of_chunk(x_LNK):
            x_LBTK = x_LNK.reshape(layers, batch, length, -1)
            return lax.dynamic_slice_in_dim(x_LBTK, first, chunk, axis=2).reshape(layers, batch * chunk, -1)

        live = policy.of_tokens(of_chunk)
        x_BTD, cache, traffic = decoder.extend(
            params, cache, tokens, jnp.full(batch, first, jnp.int32), valid, live, execution
        )
        place_B = length_B - 1 - first
        ends_here_B = (place_B >= 0) & (place_B < chunk)
        ended_BD = x_BTD[jnp.arange(batch), jnp.clip(place_B, 0, chunk - 1)]
        chosen = traffic.chosen_NK.reshape(layers, batch, chunk, -1)
        chosen_LBTK = lax.dynamic_update_slice_in_dim(chosen_LBTK, chosen, first, axis=2)
        return cache, jnp.where(ends_here_B[:, None], ended_BD, last_BD), chosen_LBTK

    last_BD = jnp.zeros((batch, trunk.d_model), decoder.dtype_of(params))
    chosen_LBTK = jnp.full((layers, batch, length, execution.k_max), -1, jnp.int32)
    count = -(-length_B.max() // chunk)
    cache, last_BD, chosen_LBTK = lax.fori_loop(0, count, read, (cache, last_BD, chosen_LBTK))
    return last_BD, chosen_LBTK.reshape(layers, batch * length, -1), cache


@functools.partial(jax.jit, static_argnames="execution", donate_argnames="cache")
def decode(params, cache, token_B, position_B, alive_B, live: Live, *, execution):
    """Reads the last token of each row that is alive, and draws the next."""
    with jax.named_scope("decode"):
        x_BTD, cache, traffic = decoder.extend(
            params, cache, token_B[:, None], position_B, alive_B[:, None], live.policy, execution
        )
    return _draw(params, x_BTD[:, 0], position_B + 1, traffic.chosen_NK, live, execution), cache


def _draw(params, x_BD, position_B, chosen_LNK, live, execution):
    with jax.named_scope("sample"):
        logits_BV = decoder.logits(params, x_BD, execution.kernels.projection)
        token_B, log_probability_B = draw(logits_BV, live.sampling, position_B)
    return Drawn(token_B, log_probability_B, chosen_LNK)
