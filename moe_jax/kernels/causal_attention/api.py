"""Causal attention over sequences, whole or from any position on: the contract and the implementations.

A module has `forward` and `backward`, or `mix`, which JAX differentiates by itself.
"""

import functools
import types

import jax
import jax.numpy as jnp

from moe_jax.kernels.causal_attention import blocked, cudnn, native, splash

IMPLEMENTATIONS = {"native": native, "blocked": blocked, "splash": splash, "cudnn": cudnn}
# the best first; `cudnn` has not run on a device yet, and is taken if it is named
BY_PLATFORM = {"cpu": ("native", "blocked"), "gpu": ("blocked",), "tpu": ("splash", "blocked")}


def causal_attention(
    query_BTHA: jax.Array,
    key_BMGA: jax.Array,
    value_BMGX: jax.Array,
    segments_BM: jax.Array | None,
    start_B: jax.Array,
    scale: float,
    implementation: str,
    *,
    prefixes: bool,
) -> jax.Array:
    """Attention of each position to itself, and to earlier positions of its segment or of a prefix.

    A prefix segment has a negative number; every later segment of its row continues it. There may be fewer queries than
    keys: query t of a row is at position start + t, and no query sees the keys after the last one. Softmax and sums are
    float32. Query head h reads key and value head h * G // H.

    Differentiable in queries, keys and values; the gradient recomputes the scores. Results and gradients are the same,
    bit for bit, from run to run for any number of threads, except for the gradient of `cudnn`. Runs on local arrays,
    inside `shard_map` if there is one.

    Args:
        query_BTHA: queries, rotated; H is a multiple of G.
        key_BMGA: keys, rotated; M is at least T.
        value_BMGX: values.
        segments_BM: int32, the segment of every position; padding is a segment like any other. None: one segment.
        start_B: int32, the position of each row's first query, from 0 to M - T (not checked).
        scale: factor of the scores, static.
        implementation: a name from `IMPLEMENTATIONS`, static.
        prefixes: whether some segments may be negative, static. An implementation that has no prefixes (`PREFIXES`)
            leaves such calls to `blocked`.

    Returns:
        mixed_BTHX in the dtype of the values.
    """
    module = IMPLEMENTATIONS[implementation]
    if prefixes and not getattr(module, "PREFIXES", True):
        module = blocked
    if hasattr(module, "mix"):
        return module.mix(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale)
    if segments_BM is None:
        segments_BM = jnp.ones(key_BMGA.shape[:2], jnp.int32)
    return _mix(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, module)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _mix(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, module: types.ModuleType):
    return module.forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale)[0]


def _forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, module):
    inputs = (query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B)
    mixed_BTHX, log_sum_exp_BHT = module.forward(*inputs, scale)
    return mixed_BTHX, (inputs, mixed_BTHX, log_sum_exp_BHT)


def _backward(scale, module, residuals, mixed_grad_BTHX):
    inputs, *outputs = residuals
    return *module.backward(*inputs, scale, *outputs, mixed_grad_BTHX), None, None


_mix.defvjp(_forward, _backward)
