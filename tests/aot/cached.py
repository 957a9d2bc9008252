"""A loop over layers that each add a position to a cache and attend over it, compiled for a chip that is not there."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.kernels.cached_attention import api
from tests import launcher_module

compilers = launcher_module.import_launcher("compilers", "benchmarks")


def temporaries(chip, heads, rows, positions, layers=4):
    """The temporaries of the best implementation, over the bytes of one layer's cache.

    Args:
        chip: of `benchmarks/compilers.py`.
        heads: of queries and of keys; channels of keys and of values; if these differ, keys hold the values.
        rows: of the batch.
        positions: of the cache.
        layers: of it.
    """
    num_heads, kv_heads, channels, value_channels = heads
    implementation = api.BY_PLATFORM["gpu" if chip == "h100" else "tpu"][0]
    apart = channels == value_channels

    def steps(query_LBHA, new_LBGA, caches, position_B):
        def step(layer, carried):
            mixed_BHX, caches = carried
            padded_BHA = jnp.pad(mixed_BHX, ((0, 0), (0, 0), (0, channels - value_channels)))
            new = query_LBHA[layer] + padded_BHA, new_LBGA[layer], new_LBGA[layer] if apart else None
            mixed_BHX, *caches = api.cached_attention(
                *new, *caches, layer, position_B, 0.09, value_channels, implementation
            )
            return mixed_BHX, tuple(caches)

        mixed_BHX = jnp.zeros((rows, num_heads, value_channels), jnp.bfloat16)
        return lax.fori_loop(0, layers, step, (mixed_BHX, caches))

    shape = compilers.shape
    new = shape(layers, rows, num_heads, channels), shape(layers, rows, kv_heads, channels)
    cache = shape(layers, rows, positions, kv_heads, channels)
    donating = jax.jit(steps, donate_argnums=2)
    caches = cache, cache if apart else None
    program = compilers.compiled(chip, donating, *new, caches, shape(rows, dtype=jnp.int32))
    layer_bytes = 2 * (1 + apart) * cache.size / layers
    return program.memory_analysis().temp_size_in_bytes / layer_bytes
