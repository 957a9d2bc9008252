"""Sampling the next token: greedy, or with temperature, top-k and top-p, with settings per row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

COLDEST = 1e-6  # lower temperatures are raised to it, so that the division stays finite


class Sampling(NamedTuple):
    """Live settings, one entry per request. Changing their values does not recompile."""

    temperature_B: jax.Array  # float32; 0: greedy
    top_k_B: jax.Array  # int32; 0: all tokens
    top_p_B: jax.Array  # float32
    seed_B: jax.Array  # uint32


def sample_tokens(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row.

    The random key depends only on the request's seed and the position of the new token. A request therefore samples the
    same tokens alone or in a batch, in any order. Two requests with the same prompt and seed sample the same tokens.

    Temperature comes first, then top-k, then top-p within what top-k left, as in transformers. Tokens that tie with
    the last one kept are kept too. Greedy rows take the lowest id among ties.

    Args:
        logits_BV: float32.
        sampling: settings of the rows.
        position_B: int32, the position of the new token.

    Returns:
        token_B int32, and its log-probability_B float32 under the model itself: the softmax of `logits_BV`, before
        temperature, top-k and top-p.
    """
    greedy_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)

    def sampled() -> jax.Array:
        scaled_BV = logits_BV - logits_BV.max(axis=1, keepdims=True)
        scaled_BV = scaled_BV / jnp.maximum(sampling.temperature_B, COLDEST)[:, None]
        is_cut = ((sampling.top_k_B > 0) | (sampling.top_p_B < 1)).any()
        scaled_BV = lax.cond(is_cut, lambda: _cut(scaled_BV, sampling), lambda: scaled_BV)
        keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
            sampling.seed_B, position_B
        )
        sampled_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)
        return jnp.where(sampling.temperature_B > 0, sampled_B, greedy_B)

    token_B = lax.cond((sampling.temperature_B > 0).any(), sampled, lambda: greedy_B)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=1)


def _cut(scaled_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets tokens that top-k and top-p exclude to -inf; the best token always stays."""
    vocab_size = scaled_BV.shape[1]
    rank_V = jnp.arange(vocab_size)
    best_first_BV = jnp.sort(scaled_BV, axis=1, descending=True)
    top_k_B = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, vocab_size)
    within_BV = rank_V[None, :] < top_k_B[:, None]
    share_BV = jax.nn.softmax(jnp.where(within_BV, best_first_BV, -jnp.inf), axis=1)
    better_BV = jnp.cumsum(share_BV, axis=1) - share_BV  # rounding may bring it to 1 before the last token
    within_BV &= (better_BV < sampling.top_p_B[:, None]) | (sampling.top_p_B[:, None] >= 1)
    last_B = jnp.take_along_axis(best_first_BV, within_BV.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
    return jnp.where(scaled_BV >= last_B[:, None], scaled_BV, -jnp.inf)
