"""Attention over whole sequences in plain JAX, on any platform.

Goes by blocks of queries, so that the keys behind a block are not multiplied, and recomputes the scores in the gradient
rather than keep them.
"""

import functools

import jax
import jax.numpy as jnp

QUERY_BLOCK = 128  # queries that attend at once


def forward(query_BTHA, key_BTGA, value_BTGX, segments_BT, scale):
    """As `api.causal_attention`; keeps nothing for the gradient."""
    length = query_BTHA.shape[1]
    mix_block = jax.checkpoint(functools.partial(_mix, scale=scale))
    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        order_TM = jnp.arange(first, last)[:, None] >= jnp.arange(last)[None, :]
        key_segments_B1M = segments_BT[:, None, :last]
        mask_BTM = ((segments_BT[:, first:last, None] == key_segments_B1M) | (key_segments_B1M < 0)) & order_TM[None]
        blocks.append(mix_block(query_BTHA[:, first:last], key_BTGA[:, :last], value_BTGX[:, :last], mask_BTM))
    return jnp.concatenate(blocks, axis=1), None


def backward(query_BTHA, key_BTGA, value_BTGX, segments_BT, scale, mixed_BTHX, log_sum_exp_BHT, mixed_grad_BTHX):
    """The gradients for queries, keys and values."""
    del mixed_BTHX, log_sum_exp_BHT
    _, pull = jax.vjp(lambda *inputs: forward(*inputs, segments_BT, scale)[0], query_BTHA, key_BTGA, value_BTGX)
    return pull(mixed_grad_BTHX)


def _mix(query_BTHA, key_BMGA, value_BMGX, mask_BTM, scale):
    """Softmax attention in float32. Every query must see a key."""
    batch, num_queries, heads, head_dim = query_BTHA.shape
    query_BTGQA = query_BTHA.reshape(batch, num_queries, key_BMGA.shape[2], -1, head_dim)
    score_BGQTM = jnp.einsum("btgqa,bmga->bgqtm", query_BTGQA, key_BMGA, preferred_element_type=jnp.float32)
    score_BGQTM = jnp.where(mask_BTM[:, None, None], score_BGQTM * scale, -1e30)
    share_BGQTM = jax.nn.softmax(score_BGQTM, axis=-1).astype(value_BMGX.dtype)
    return jnp.einsum("bgqtm,bmgx->btgqx", share_BGQTM, value_BMGX).reshape(batch, num_queries, heads, -1)
