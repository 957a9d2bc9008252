"""Attention by cuDNN, lowered for GPUs by a machine that has none.

Needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cudnn-cu13. cuDNN itself plans only where there is a device, and JAX
takes heads of more than 128 channels only beside a Hopper GPU: `-m gpu` has these.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.kernels.causal_attention.api import causal_attention

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module", autouse=True)
def libraries():
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin")
    pytest.importorskip("nvidia.cudnn", reason="needs nvidia-cudnn-cu13")


@pytest.mark.parametrize(
    ("queries", "keys", "segmented", "calls"),
    [
        (2048, 2048, False, {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}),
        (2048, 2048, True, {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}),
        (2048, 8192, False, {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (32, 4)])
def test_values_and_gradients_are_calls_of_cudnn(heads, kv_heads, queries, keys, segmented, calls):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def with_gradient(query, key, value, segments_BM, start_B, grad):
        def mix(*inputs):
            places = segments_BM if segmented else None, start_B
            return causal_attention(*inputs, *places, 0.09, "cudnn", prefixes=segmented)

        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    cache = shape(2, keys, kv_heads, 128)
    places = shape(2, keys, dtype=jnp.int32), shape(2, dtype=jnp.int32)
    operands = (shape(2, queries, heads, 128), cache, cache, *places, shape(2, queries, heads, 128))
    text = jax.jit(with_gradient).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", text)) == calls
    assert ("CAUSAL" in text) == (queries == keys)
