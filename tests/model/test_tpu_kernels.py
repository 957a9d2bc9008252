"""The whole model with the TPU's kernels, interpreted on a CPU, gives the CPU's logits and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax.engine import cache as caches
from moe_jax.kernels.chooser import resolve
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from tests import tiny_model

TOLERANCE = 1e-4  # of the largest value, float32
ARCHITECTURE = tiny_model.changed(decoder={"num_layers": 2})


@functools.partial(jax.jit, static_argnames="execution")
def step(params, cache, tokens_BT, start_B, live, *, execution):
    valid_BT = jnp.ones(tokens_BT.shape, bool)
    x_BTD, cache, _ = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, live, execution)
    return decoder.logits(params, x_BTD), cache


@functools.partial(jax.jit, static_argnames="execution")
def gradients(params, tokens_BT, live, *, execution):
    def loss(params):
        positions_BT = jnp.tile(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), (len(tokens_BT), 1))
        x_BTD, _ = decoder.hidden(params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), live, execution)
        return (decoder.logits(params, x_BTD) ** 2).mean()

    return jax.grad(loss)(params)


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
def test_prefill_decode_and_gradients():
    params = tiny_model.random_params(ARCHITECTURE)
    live = policies.settings([parse("topk:8"), parse("topk:3")], ARCHITECTURE, 8)
    tokens_BT = np.random.default_rng(0).integers(0, 512, (2, 6), dtype=np.int32)
    results = []
    for platform in ("cpu", "tpu"):
        execution = decoder.Execution(ARCHITECTURE, 8, resolve(platform, ARCHITECTURE, "float32"))
        with pltpu.force_tpu_interpret_mode():
            cache, start_B = caches.allocate(ARCHITECTURE, 2, 8, jnp.float32), np.zeros(2, np.int32)
            prefill, cache = step(params, cache, tokens_BT[:, :5], start_B, live, execution=execution)
            decode, _ = step(params, cache, tokens_BT[:, 5:], start_B + 5, live, execution=execution)
            results.append((prefill, decode, gradients(params, tokens_BT, live, execution=execution)))
    jax.tree.map(assert_close, results[1], results[0])
