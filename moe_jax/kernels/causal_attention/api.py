"""Causal attention over sequences, whole or from any position on: the contract and the implementations."""

import functools

import jax

from moe_jax.kernels.causal_attention import blocked, native

IMPLEMENTATIONS = {"native": native, "blocked": blocked}
BY_PLATFORM = {"cpu": ("native", "blocked"), "gpu": ("blocked",), "tpu": ("blocked",)}  # the best first


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def causal_attention(
    query_BTHA: jax.Array,
    key_BMGA: jax.Array,
    value_BMGX: jax.Array,
    segments_BM: jax.Array,
    start_B: jax.Array,
    scale: float,
    implementation: str,
) -> jax.Array:
    """Attention of each position to itself, and to earlier positions of its segment or of a prefix.

    A prefix segment has a negative number; every later segment of its row continues it. There may be fewer queries than
    keys: query t of a row is at position start + t, and no query sees the keys after the last one. Softmax and sums are
    float32. Query head h reads key and value head h * G // H.

    Differentiable in queries, keys and values; the gradient recomputes the scores. Results and gradients are the same,
    bit for bit, from run to run for any number of threads. Runs on local arrays, inside `shard_map` if there is one.

    Args:
        query_BTHA: queries, rotated; H is a multiple of G.
        key_BMGA: keys, rotated; M is at least T.
        value_BMGX: values.
        segments_BM: int32, the segment of every position; padding is a segment like any other.
        start_B: int32, the position of each row's first query, from 0 to M - T (not checked).
        scale: factor of the scores, static.
        implementation: a name from `IMPLEMENTATIONS`, static.

    Returns:
        mixed_BTHX in the dtype of the values.
    """
    return _forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, implementation)[0]


def _forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, implementation):
    inputs = (query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B)
    mixed_BTHX, log_sum_exp_BHT = IMPLEMENTATIONS[implementation].forward(*inputs, scale)
    return mixed_BTHX, (inputs, mixed_BTHX, log_sum_exp_BHT)


def _backward(scale, implementation, residuals, mixed_grad_BTHX):
    inputs, *outputs = residuals
    return *IMPLEMENTATIONS[implementation].backward(*inputs, scale, *outputs, mixed_grad_BTHX), None, None


causal_attention.defvjp(_forward, _backward)
