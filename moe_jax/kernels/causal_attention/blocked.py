"""Causal attention in plain JAX, on any platform (flash attention: arXiv 2307.08691).

Scores exist for one block of queries and one block of keys at a time; blocks above the diagonal are not computed. Both
loops stay loops in the compiled program, so its size does not depend on the length. The gradient recomputes the scores
from the log-sum-exp of every query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # queries or keys per block, at most
LONG_BLOCK = 256  # for a forward pass of few heads: a sixth faster for long sequences on a CPU
FEW_HEADS = 16  # summed over rows
HIDDEN = -1e30  # the score of a key that a query does not see


class _Queries(NamedTuple):
    """Queries in blocks; the first axis of every array is the block."""

    query_BGQTA: jax.Array
    segment_BT: jax.Array
    position_BT: jax.Array


class _Keys(NamedTuple):
    """Keys and values in blocks, like `_Queries`."""

    key_BGMA: jax.Array
    value_BGMX: jax.Array
    segment_BM: jax.Array
    position_M: jax.Array

    def block(self, index: jax.Array) -> "_Keys":
        """One block."""
        return _Keys(*(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in self))


def forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale):
    """As `api.causal_attention`; also the log-sum-exp of every query's scores, float32 [B, H, T]."""
    batch, length, heads, _ = query_BTHA.shape
    longest = LONG_BLOCK if batch * heads <= FEW_HEADS else BLOCK
    queries, keys = _in_blocks(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, longest)

    def mix(_, queries):
        def add(index, so_far):
            max_BGQT, sum_BGQT, mixed_BGQTX = so_far
            block = keys.block(index)
            score_BGQTM = _scores(queries, block, scale)
            new_max_BGQT = jnp.maximum(max_BGQT, score_BGQTM.max(axis=-1))
            share_BGQTM = jnp.exp(score_BGQTM - new_max_BGQT[..., None])
            factor_BGQT = jnp.exp(max_BGQT - new_max_BGQT)
            new_BGQTX = _product("bgqtm,bgmx->bgqtx", share_BGQTM.astype(value_BMGX.dtype), block.value_BGMX)
            sum_BGQT = factor_BGQT * sum_BGQT + share_BGQTM.sum(axis=-1)
            return new_max_BGQT, sum_BGQT, factor_BGQT[..., None] * mixed_BGQTX + new_BGQTX

        shape = queries.query_BGQTA.shape[:-1]
        initial = jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros((*shape, value_BMGX.shape[-1]))
        max_BGQT, sum_BGQT, mixed_BGQTX = lax.fori_loop(0, _blocks_seen(queries, keys), add, initial)
        return None, ((mixed_BGQTX / sum_BGQT[..., None]).astype(value_BMGX.dtype), max_BGQT + jnp.log(sum_BGQT))

    _, (mixed, log_sum_exp) = lax.scan(mix, None, queries)
    log_sum_exp_BHT = jnp.moveaxis(log_sum_exp, 0, 3).reshape(batch, heads, -1)[:, :, :length]
    return _joined(mixed, length), log_sum_exp_BHT


def backward(
    query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, mixed_BTHX, log_sum_exp_BHT, mixed_grad_BTHX
):
    """The gradients for queries, keys and values."""
    queries, keys = _in_blocks(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, BLOCK)
    delta_BTH = jnp.einsum("bthx,bthx->bth", mixed_BTHX, mixed_grad_BTHX, preferred_element_type=jnp.float32)

    def block_gradients(key_grads, given):
        queries, mixed_grad_BGQTX, delta_BGQT1, log_sum_exp_BGQT1 = given

        def add(index, so_far):
            query_grad_BGQTA, *key_grads = so_far
            block = keys.block(index)
            share_BGQTM = jnp.exp(_scores(queries, block, scale) - log_sum_exp_BGQT1)
            share_grad_BGQTM = _product("bgqtx,bgmx->bgqtm", mixed_grad_BGQTX, block.value_BGMX)
            score_grad_BGQTM = scale * share_BGQTM * (share_grad_BGQTM - delta_BGQT1)
            score_grad_BGQTM = score_grad_BGQTM.astype(query_BTHA.dtype)
            query_grad_BGQTA += _product("bgqtm,bgma->bgqta", score_grad_BGQTM, block.key_BGMA)
            new_grads = (
                _product("bgqtm,bgqta->bgma", score_grad_BGQTM, queries.query_BGQTA),
                _product("bgqtm,bgqtx->bgmx", share_BGQTM.astype(mixed_grad_BTHX.dtype), mixed_grad_BGQTX),
            )
            return query_grad_BGQTA, *(_added(grad, index, new) for grad, new in zip(key_grads, new_grads))

        zeros = jnp.zeros(queries.query_BGQTA.shape)
        query_grad_BGQTA, *key_grads = lax.fori_loop(0, _blocks_seen(queries, keys), add, (zeros, *key_grads))
        return tuple(key_grads), query_grad_BGQTA.astype(query_BTHA.dtype)

    count, _, kv_heads, _, block, _ = queries.query_BGQTA.shape
    given = (
        _query_blocks(mixed_grad_BTHX, count, block, kv_heads),
        _query_blocks(delta_BTH[..., None], count, block, kv_heads),
        _query_blocks(jnp.swapaxes(log_sum_exp_BHT, 1, 2)[..., None], count, block, kv_heads),
    )
    zeros = jnp.zeros(keys.key_BGMA.shape), jnp.zeros(keys.value_BGMX.shape)
    key_grads, query_grad = lax.scan(block_gradients, zeros, (queries, *given))
    key_grad_BMGA, value_grad_BMGX = (_joined(x[:, :, :, None], key_BMGA.shape[1]) for x in key_grads)
    query_grad_BTHA = _joined(query_grad, query_BTHA.shape[1])
    return query_grad_BTHA, key_grad_BMGA.astype(key_BMGA.dtype), value_grad_BMGX.astype(value_BMGX.dtype)


def _in_blocks(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, longest: int) -> tuple[_Queries, _Keys]:
    """Blocks as even as can be: the padding at the end is less than a position for each."""
    memory, kv_heads = key_BMGA.shape[1:3]
    count, block = _even(memory, longest)
    position = jnp.arange(count * block).reshape(count, block)
    key, value = (jnp.swapaxes(_split(x, count, block), 2, 3) for x in (key_BMGA, value_BMGX))
    keys = _Keys(key, value, _split(segments_BM, count, block), position)

    count, block = _even(query_BTHA.shape[1], longest)
    position_BT = jnp.minimum(start_B[:, None] + jnp.arange(count * block)[None, :], memory - 1)
    segment_BT = jnp.take_along_axis(segments_BM, position_BT, axis=1)
    places = (_split(x, count, block) for x in (segment_BT, position_BT))
    return _Queries(_query_blocks(query_BTHA, count, block, kv_heads), *places), keys


def _even(length: int, longest: int) -> tuple[int, int]:
    """The number of blocks of even length, and that length."""
    count = -(-length // longest)
    return count, -(-length // count)


def _split(x_BT, count: int, block: int) -> jax.Array:
    """[B, T, ...] as [count, B, block, ...]; the last block is padded with zeros."""
    batch, length, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, ((0, 0), (0, count * block - length), *((0, 0) for _ in rest)))
    return jnp.moveaxis(x_BT.reshape(batch, count, block, *rest), 1, 0)


def _query_blocks(x_BTHA, count: int, block: int, kv_heads: int) -> jax.Array:
    """[B, T, H, A] as [count, B, G, Q, block, A]."""
    split = _split(x_BTHA, count, block)
    split = split.reshape(*split.shape[:3], kv_heads, -1, split.shape[-1])
    return jnp.moveaxis(split, 2, 4)


def _joined(blocks, length: int) -> jax.Array:
    """[count, B, G, Q, block, A] as [B, T, H, A], without the padding of the last block."""
    count, batch, kv_heads, queries_per_key, block, width = blocks.shape
    x_BTHA = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * block, kv_heads * queries_per_key, width)
    return x_BTHA[:, :length]


def _blocks_seen(queries: _Queries, keys: _Keys) -> jax.Array:
    """The number of key blocks up to the diagonal, which the queries of a block may see."""
    return queries.position_BT.max() // keys.position_M.shape[1] + 1


def _scores(queries: _Queries, keys: _Keys, scale: float) -> jax.Array:
    """float32 scores; `HIDDEN` if a query does not see a key."""
    key_segment_B1M = keys.segment_BM[:, None, :]
    in_sight_BTM = (queries.segment_BT[:, :, None] == key_segment_B1M) | (key_segment_B1M < 0)
    seen_BTM = in_sight_BTM & (queries.position_BT[:, :, None] >= keys.position_M[None, None, :])
    score_BGQTM = _product("bgqta,bgma->bgqtm", queries.query_BGQTA, keys.key_BGMA)
    return jnp.where(seen_BTM[:, None, None], scale * score_BGQTM, HIDDEN)


def _product(axes: str, left, right) -> jax.Array:
    """An einsum with float32 sums."""
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _added(blocks, index, new) -> jax.Array:
    """Adds to one block."""
    old = lax.dynamic_index_in_dim(blocks, index, keepdims=False)
    return lax.dynamic_update_index_in_dim(blocks, old + new, index, 0)
