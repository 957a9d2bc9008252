"""Attention through the real TPU compiler, for TPUs that are not there (`requirements-aot.txt` brings it)."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.kernels.causal_attention.api import causal_attention
from tests.aot import cached_attention as cached
from tests.aot.test_tpu import TOPOLOGIES, compiled, one_device, shape

pytestmark = pytest.mark.aot
MODEL = "olmoe_1b_7b"
# query heads, key heads, channels of keys, channels of values
HEADS = {"olmoe_1b_7b": (16, 16, 128, 128), "qwen3_30b_a3b": (32, 4, 128, 128), "deepseek_v2_lite": (16, 16, 192, 128)}
# positions of queries and of keys
LENGTHS = {"2048": (2048, 2048), "8192": (8192, 8192), "chunk": (2048, 8192), "uneven": (700, 700)}
IN_CI = {("olmoe_1b_7b", "8192"), ("qwen3_30b_a3b", "chunk"), ("deepseek_v2_lite", "2048")}


def cases():
    for chip in TOPOLOGIES:
        for model in HEADS:
            for length in LENGTHS:
                marks = () if (model, length) in IN_CI else (pytest.mark.slow,)
                yield pytest.param(chip, model, length, marks=marks, id=f"{chip}-{model}-{length}")


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("chip", "model", "length"), list(cases()))
def test_values_and_gradients_compile_and_keep_no_scores(chip, model, length, segmented):
    heads, kv_heads, channels, value_channels = HEADS[model]
    queries, keys = LENGTHS[length]

    def with_gradient(query, key, value, segments_BM, start_B, grad):
        def mix(*inputs):
            places = segments_BM if segmented else None, start_B
            return causal_attention(*inputs, *places, 0.09, "splash", prefixes=False)

        mixed, pull = jax.vjp(mix, query, key, value)
        return mixed, *pull(grad)

    operands = (
        shape(2, queries, heads, channels),
        shape(2, keys, kv_heads, channels),
        shape(2, keys, kv_heads, value_channels),
        shape(2, keys, dtype=jnp.int32),
        shape(2, dtype=jnp.int32),
        shape(2, queries, heads, value_channels),
    )
    program = compiled(chip, with_gradient, *operands)
    text = program.as_text()
    assert all(f"%splash_mha_{kernel}" in text for kernel in ("fwd", "dq", "dkv"))
    score_bytes = 4 * 2 * heads * queries * keys
    assert program.memory_analysis().temp_size_in_bytes < score_bytes / 2 or queries < 2048


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_decoding_reads_the_cache_where_it_lies(chip):
    program = jax.jit(cached.steps("dots"), donate_argnums=(3, 4), out_shardings=one_device(chip))
    on_device = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device(chip)) for x in cached.operands(MODEL, shape)
    ]
    temporaries = program.lower(*on_device).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < cached.layer_bytes(MODEL) / 4
