"""A loop over layers, each of which adds a row's token to the cache and attends to it: what a decode step does."""

import jax
import jax.numpy as jnp

from moe_jax.kernels.cached_attention.api import cached_attention

LAYERS, ROWS, MEMORY, WIDTH = 16, 64, 1024, 128
HEADS = {"olmoe_1b_7b": (16, 16), "qwen3_30b_a3b": (32, 4)}  # query heads, key heads


def steps(implementation):
    """A function of `operands`."""

    def run(query, key, value, keys, values, position):
        def layer(number, carried):
            return cached_attention(carried[0], key, value, *carried[1:], number, position, 0.1, WIDTH, implementation)

        return jax.lax.fori_loop(0, LAYERS, layer, (query, keys, values))

    return run


def operands(model, shape):
    heads, kv_heads = HEADS[model]
    new = shape(ROWS, kv_heads, WIDTH)
    cache = shape(LAYERS, ROWS, MEMORY, kv_heads, WIDTH)
    return shape(ROWS, heads, WIDTH), new, new, cache, cache, shape(ROWS, dtype=jnp.int32)


def layer_bytes(model):
    """Of the keys of one layer."""
    return 2 * ROWS * MEMORY * HEADS[model][1] * WIDTH
