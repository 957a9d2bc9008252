"""Grouped-query attention: whole sequences, and one step against a cache."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_jax.config.schema import Architecture, AttentionConfig
from moe_jax.model import rope
from moe_jax.model.layers import Stacked, draw, ones, project, rms_norm

QUERY_BLOCK = 128  # queries that attend at once: keys beyond the block are never multiplied
TERMS = 8  # products that a step against the cache adds up at once


class Attention(nnx.Module):
    """Weights of the attention of every layer of a stack."""

    def __init__(self, architecture: Architecture, num_layers: int, residual_gain: float, rngs: nnx.Rngs):
        attention, d_model = architecture.attention, architecture.decoder.d_model
        heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.query_LHAD = draw(rngs, (num_layers, heads, head_dim, d_model), d_model)
        self.key_LGAD = draw(rngs, (num_layers, kv_heads, head_dim, d_model), d_model)
        self.value_LGAD = draw(rngs, (num_layers, kv_heads, head_dim, d_model), d_model)
        self.output_LDHA = draw(rngs, (num_layers, d_model, heads, head_dim), heads * head_dim, residual_gain)
        if attention.bias:
            self.query_bias_LHA = nnx.Param(jnp.zeros((num_layers, heads, head_dim), jnp.float32))
            self.key_bias_LGA = nnx.Param(jnp.zeros((num_layers, kv_heads, head_dim), jnp.float32))
            self.value_bias_LGA = nnx.Param(jnp.zeros((num_layers, kv_heads, head_dim), jnp.float32))
        if attention.qk_norm:
            self.query_norm_LA = ones(num_layers, head_dim)
            self.key_norm_LA = ones(num_layers, head_dim)


class Heads(NamedTuple):
    """Queries, keys and values, normed and rotated."""

    query_BTHA: jax.Array
    key_BTGA: jax.Array
    value_BTGA: jax.Array


def attend(
    x_BTD: jax.Array,
    weights: dict[str, jax.Array | Stacked],
    turn: tuple[jax.Array, jax.Array],
    attention: AttentionConfig,
    norm_eps: float,
    core: Callable[[Heads], tuple[jax.Array, Any]],
) -> tuple[jax.Array, Any]:
    """Projects to heads, lets `core` mix positions, and projects back.

    Args:
        x_BTD: normed activations.
        weights: one layer of `Attention`, its names without the leading L.
        turn: cosines and sines of the positions.
        attention: the section of the configuration.
        norm_eps: of the head norms.
        core: heads -> (mixed_BTHA, anything to hand back, such as an updated cache).

    Returns:
        out_BTD, and what `core` handed back.
    """
    query_BTHA = project(x_BTD, weights["query_HAD"])
    key_BTGA = project(x_BTD, weights["key_GAD"])
    value_BTGA = project(x_BTD, weights["value_GAD"])
    if attention.bias:
        query_BTHA = query_BTHA + weights["query_bias_HA"][None, None]
        key_BTGA = key_BTGA + weights["key_bias_GA"][None, None]
        value_BTGA = value_BTGA + weights["value_bias_GA"][None, None]
    if attention.qk_norm:
        query_BTHA = rms_norm(query_BTHA, weights["query_norm_A"], norm_eps)
        key_BTGA = rms_norm(key_BTGA, weights["key_norm_A"], norm_eps)
    mixed_BTHA, handed_back = core(Heads(rope.rotate(query_BTHA, turn), rope.rotate(key_BTGA, turn), value_BTGA))
    return project(mixed_BTHA, weights["output_DHA"], 2), handed_back


def mix(query_BTHA: jax.Array, key_BMGA: jax.Array, value_BMGA: jax.Array, mask_BTM: jax.Array) -> jax.Array:
    """Softmax attention in float32. Every query must see a key.

    Returns:
        mixed_BTHA in the dtype of the queries.
    """
    batch, num_queries, heads, head_dim = query_BTHA.shape
    query_BTGQA = query_BTHA.reshape(batch, num_queries, key_BMGA.shape[2], -1, head_dim)
    score_BGQTM = jnp.einsum("btgqa,bmga->bgqtm", query_BTGQA, key_BMGA, preferred_element_type=jnp.float32)
    score_BGQTM = jnp.where(mask_BTM[:, None, None], score_BGQTM * head_dim**-0.5, -1e30)
    share_BGQTM = jax.nn.softmax(score_BGQTM, axis=-1).astype(value_BMGA.dtype)
    return jnp.einsum("bgqtm,bmga->btgqa", share_BGQTM, value_BMGA).reshape(batch, num_queries, heads, head_dim)


def step(
    query_BTHA: jax.Array, key_LBMGA: jax.Array, value_LBMGA: jax.Array, layer: jax.Array | int, seen_BM: jax.Array
) -> jax.Array:
    """What `mix` does, for one query per row and keys and values within the stack of all layers.

    A product of matrices would copy the layer and turn it around first. The products are written out instead, a few
    terms at a time, so that XLA reads the cache where it lies.

    Args:
        query_BTHA: T is 1.
        key_LBMGA: of all layers.
        value_LBMGA: of all layers.
        layer: which of them.
        seen_BM: bool, the positions that the row sees: at least one.

    Returns:
        mixed_BTHA in the dtype of the queries.
    """
    num_layers, batch, memory, kv_heads, head_dim = key_LBMGA.shape
    query_BGQA = query_BTHA.reshape(batch, kv_heads, -1, head_dim).astype(jnp.float32)

    terms = math.gcd(head_dim, TERMS)
    keys = key_LBMGA.reshape(num_layers, batch, memory, kv_heads, terms, -1)
    queries = query_BGQA.reshape(batch, 1, *query_BGQA.shape[1:3], terms, -1)
    sums = 0.0
    for term in range(terms):
        part = lax.dynamic_slice_in_dim(lax.dynamic_index_in_dim(keys, layer, keepdims=False), term, 1, 3)
        sums = sums + queries[:, :, :, :, term] * part.astype(jnp.float32)
    score_BMGQ = lax.optimization_barrier(sums).sum(axis=-1) * head_dim**-0.5
    share_BMGQ = jax.nn.softmax(jnp.where(seen_BM[:, :, None, None], score_BMGQ, -1e30), axis=1)

    terms = math.gcd(memory, TERMS)
    values = value_LBMGA.reshape(num_layers, batch, -1, terms, kv_heads, 1, head_dim)
    shares = share_BMGQ.reshape(batch, -1, terms, *share_BMGQ.shape[2:], 1)
    sums = 0.0
    for term in range(terms):
        part = lax.dynamic_slice_in_dim(lax.dynamic_index_in_dim(values, layer, keepdims=False), term, 1, 2)
        sums = sums + shares[:, :, term] * part[:, :, 0].astype(jnp.float32)
    mixed = lax.optimization_barrier(sums).sum(axis=1)
    return mixed.reshape(query_BTHA.shape).astype(query_BTHA.dtype)


def causal(heads: Heads, segments_BT: jax.Array) -> jax.Array:
    """Attention over whole sequences: a position sees itself, and earlier positions of its segment or of a prefix.

    The number of a prefix segment is negative: every later segment of its row goes on from it.

    Goes by blocks of queries, so that the keys behind a block are not multiplied, and recomputes the scores in the
    gradient rather than keep them.
    """
    length = heads.query_BTHA.shape[1]
    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        order_TM = jnp.arange(first, last)[:, None] >= jnp.arange(last)[None, :]
        key_segments_B1M = segments_BT[:, None, :last]
        mask_BTM = ((segments_BT[:, first:last, None] == key_segments_B1M) | (key_segments_B1M < 0)) & order_TM[None]
        blocks.append(
            jax.checkpoint(mix)(
                heads.query_BTHA[:, first:last], heads.key_BTGA[:, :last], heads.value_BTGA[:, :last], mask_BTM
            )
        )
    return jnp.concatenate(blocks, axis=1)
