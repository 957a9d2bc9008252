"""The stage `attention` of `kernels.py`: causal attention by cuDNN against the plain loop, then its time.

Memory is filled with NaN before each check. A peer is the attention in plain JAX (`blocked`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import TOLERANCE, ResultsFile, poison, relative
from kernel_times import rate, time_of

from moe_jax.kernels.causal_attention import reference
from moe_jax.kernels.causal_attention.api import causal_attention

# rows, queries, keys, query heads, key heads, channels of keys, of values; segments, or None
CHECKS = {
    "one segment": (2, 64, 64, 4, 2, 64, 64, None),
    "odd length": (1, 67, 67, 4, 4, 128, 128, None),
    "latent": (1, 64, 64, 2, 2, 192, 128, None),
    "later queries": (2, 30, 100, 4, 2, 64, 64, None),
    "segments": (2, 64, 64, 4, 2, 128, 128, "packed"),
    "prefixes, odd length": (2, 61, 61, 4, 2, 128, 128, "prefix"),
    "one position": (2, 1, 1, 4, 2, 128, 128, None),
}
# query heads, key heads, channels of keys, of values
MODELS = {"olmoe": (16, 16, 128, 128), "qwen3": (32, 4, 128, 128), "v2_lite": (16, 16, 192, 128)}


def attention(results: ResultsFile, small: bool):
    """Checks, then times whole sequences, packed ones and chunks, forward and with the gradient."""
    names = ("blocked",) if small else ("cudnn", "blocked")
    for case, sizes in CHECKS.items():
        if not small or case == "prefixes, odd length":
            results.attempt(f"{case} {names[0]}", _checked, names[0], *sizes)
    longest = 64 if small else 8192
    for model, heads in MODELS.items():
        own = model == "olmoe"  # with packed rows and the peer, the others without
        for queries, packed in ((longest, False), (longest, True), (longest // 4, False))[:: 1 if own else 2]:
            for name in names if own else names[:1]:
                label = f"{model} {queries} of {longest}{' packed' * packed} {name}"
                for gradient in (False, True):
                    case = name, heads, queries, longest, packed, gradient
                    results.attempt(label + " with gradient" * gradient, _timed, *case)


def _operands(seed: int, rows: int, queries: int, keys: int, heads: int, kv_heads: int, channels: int, widths: int):
    """Queries, keys, values and a gradient of the result."""
    shapes = (
        (queries, heads, channels),
        (keys, kv_heads, channels),
        (keys, kv_heads, widths),
        (queries, heads, widths),
    )
    split = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, (rows, *shape), jnp.bfloat16) for key, shape in zip(split, shapes)]


@functools.cache
def _program(name: str, scale: float, prefixes: bool, gradient: bool):
    def run(query, key, value, grad, segments, start):
        def mix(*inputs):
            return causal_attention(*inputs, segments, start, scale, name, prefixes=prefixes)

        if not gradient:
            return (mix(query, key, value),)
        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    return jax.jit(run)


def _checked(name, rows, queries, keys, heads, kv_heads, channels, widths, kind) -> dict:
    operands = _operands(1, rows, queries, keys, heads, kv_heads, channels, widths)
    start = np.linspace(0, keys - queries, rows, dtype=np.int32)
    segments = np.ones((rows, keys), np.int32)
    if kind:
        segments[:, keys // 3 :], segments[:, keys // 2 :] = 2, 3
    if kind == "prefix":
        segments[:, : keys // 4] = -1
    scale = channels**-0.5
    for operand in operands:
        poison(operand.shape)
    out = _program(name, scale, kind == "prefix", True)(*operands, segments if kind else None, start)
    exact = [np.asarray(x, np.float32) for x in operands]
    places = (segments, start, scale)
    expected = reference.forward(*exact[:3], *places), *reference.backward(*exact[:3], *places, exact[3])
    errors = [relative(np.asarray(x, np.float32), y) for x, y in zip(out, expected) if np.abs(y).max() > 1e-6]
    return {"errors": errors, "ok": max(errors) < TOLERANCE}


def _timed(name, heads, queries, keys, packed, gradient) -> dict:
    query_heads, kv_heads, channels, widths = heads
    operands = _operands(2, 1, queries, keys, query_heads, kv_heads, channels, widths)
    segments = 1 + jnp.arange(keys, dtype=jnp.int32)[None, :] // (keys // 4) if packed else None
    start = jnp.full(1, keys - queries, jnp.int32)
    call = _program(name, channels**-0.5, False, gradient)
    figures = time_of(call, (*operands, segments, start), 1)
    seen = queries * (keys - queries / 2)  # pairs; packed ones are counted as if there were one segment
    products = 1 if not gradient else 3.5  # the gradient recomputes scores: five products, where the forward has two
    flops = products * 2 * query_heads * (channels + widths) * seen
    return figures | {"tflops": rate(flops, figures) / 1e6}
