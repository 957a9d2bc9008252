"""Attention against a cache: every implementation against the plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.cached_attention import reference
from moe_jax.kernels.cached_attention.api import IMPLEMENTATIONS, cached_attention

# largest difference over the largest value of the reference
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
# rows, positions of the cache, query heads, key heads, channels of keys, channels of values
CASES = {
    "one_head_each": (3, 16, 4, 4, 32, 32),
    "grouped": (2, 80, 12, 3, 24, 24),
    "more_heads_than_a_piece": (1, 8, 20, 1, 16, 16),
    "longer_than_a_block": (2, 200, 2, 1, 136, 136),
    "narrow": (5, 16, 2, 2, 6, 6),
    "keys_hold_the_values": (2, 72, 10, 1, 40, 24),
}
LAYERS, LAYER, SCALE = 3, 1, 0.3


def random_inputs(case, dtype):
    rows, memory, heads, kv_heads, key_channels, value_channels = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, key = normal(rows, heads, key_channels), normal(rows, kv_heads, key_channels)
    keys = normal(LAYERS, rows, memory, kv_heads, key_channels)
    value = values = None
    if case != "keys_hold_the_values":
        value, values = normal(rows, kv_heads, value_channels), normal(LAYERS, rows, memory, kv_heads, value_channels)
    position = rng.integers(0, memory, rows)
    position[0] = memory - 1
    return query, key, value, keys, values, LAYER, position, SCALE, value_channels


def run(implementation, query, key, value, keys, values, layer, position, scale, value_channels):
    call = jax.jit(cached_attention, static_argnums=(7, 8, 9))
    return call(query, key, value, keys, values, layer, position, scale, value_channels, implementation)


def assert_agrees(got, expected, dtype):
    mixed, keys, values = expected
    assert got[0].dtype == jnp.dtype(dtype)
    assert np.abs(np.asarray(got[0], np.float64) - mixed).max() <= TOLERANCE[dtype] * np.abs(mixed).max()
    np.testing.assert_array_equal(got[1], keys)
    if values is None:
        assert got[2] is None
    else:
        np.testing.assert_array_equal(got[2], values)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mixes_and_extends_like_the_plain_loop(implementation, case, dtype):
    given = random_inputs(case, dtype)
    assert_agrees(run(implementation, *given), reference.forward(*given), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_first_position_sees_only_itself(implementation):
    query, key, value, *rest = random_inputs("grouped", "float32")
    rest[3] = np.zeros(len(query), int)
    mixed, _, _ = run(implementation, query, key, value, *rest)
    np.testing.assert_allclose(mixed, np.repeat(value, 4, axis=1), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_positions_that_a_row_does_not_see_are_not_read(implementation):
    """Later positions and other layers: NaN there would spread if it were multiplied, even by zero."""
    query, key, value, keys, values, layer, position, *rest = random_inputs("longer_than_a_block", "float32")
    position = np.minimum(position, 100)
    keys, values = (np.array(cache) for cache in (keys, values))
    clean = reference.forward(query, key, value, keys, values, layer, position, *rest)[0]
    for cache in (keys, values):
        cache[[0, 2]] = np.nan
    if implementation == "native":  # XLA multiplies masked values by zero
        keys[layer, :, 101:] = values[layer, :, 101:] = np.nan
    mixed, _, _ = run(implementation, query, key, value, keys, values, layer, position, *rest)
    np.testing.assert_allclose(mixed, clean, rtol=1e-4, atol=1e-6)


def test_caches_of_a_loop_are_extended_in_place():
    """Passing them on costs no copy: the compiled program allocates nothing of their size."""
    query, key, value, keys, values, _, position, *rest = random_inputs("longer_than_a_block", "bfloat16")

    def steps(keys, values, position):
        def step(layer, carried):
            mixed, keys, values = carried
            new = cached_attention(query, key, value, keys, values, layer, position, *rest, "native")
            return mixed + new[0], *new[1:]

        return jax.lax.fori_loop(0, LAYERS, step, (jnp.zeros_like(query), keys, values))

    compiled = jax.jit(steps, donate_argnums=(0, 1)).lower(keys, values, position).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < keys.nbytes / 4
