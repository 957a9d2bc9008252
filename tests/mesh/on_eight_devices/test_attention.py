"""Attention spread over devices equals attention on one, with its gradients, whatever the number of key heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.causal_attention.api import causal_attention
from moe_jax.model.sharding import Layout
from moe_jax.model.spread_attention import spread

ROWS, LENGTH, CHANNELS = 4, 16, 8


@pytest.mark.parametrize(
    ("heads", "kv_heads", "segmented"), [(8, 8, True), (8, 2, False), (12, 3, True), (4, 1, False)]
)
def test_values_and_gradients(mesh_of, heads, kv_heads, segmented):
    random = np.random.default_rng(0)

    def normal(count):
        return random.standard_normal((ROWS, LENGTH, count, CHANNELS)).astype(np.float32)

    inputs, grad = (normal(heads), normal(kv_heads), normal(kv_heads)), normal(heads)
    segments_BM = np.repeat([[1, 2]], ROWS, axis=0).repeat(LENGTH // 2, axis=1).astype(np.int32) if segmented else None
    places = segments_BM, np.zeros(ROWS, np.int32), 0.3, "blocked"
    layout = Layout(mesh_of((2, 1, 4)))

    def with_gradient(mix):
        mixed, pull = jax.vjp(mix, *inputs)
        return mixed, *pull(jnp.asarray(grad))

    got = jax.jit(lambda: with_gradient(lambda *qkv: spread(*qkv, *places, layout, prefixes=False)))()
    expected = jax.jit(lambda: with_gradient(lambda *qkv: causal_attention(*qkv, *places, prefixes=False)))()
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(np.abs(other).max()))
