"""Attention through the real TPU compiler, for TPUs that are not there (`requirements-aot.txt` brings it)."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moe_jax.kernels.cached_attention import api
from tests import launcher_module

matrix = launcher_module.import_launcher("compile_matrix", "benchmarks")
shape = matrix.shape
pytestmark = pytest.mark.aot
IN_CI = {("olmoe_1b_7b", "8192"), ("qwen3_30b_a3b", "2048 of 8192"), ("deepseek_v2_lite", "2048")}


def cases():
    for chip in matrix.compilers.TPUS:
        for model in matrix.HEADS:
            for length in matrix.LENGTHS:
                marks = () if (model, length) in IN_CI else (pytest.mark.slow,)
                yield pytest.param(chip, model, length, marks=marks, id=f"{chip}-{model}-{length}")


@pytest.mark.parametrize("work", matrix.ATTENTION)
@pytest.mark.parametrize(("chip", "model", "length"), list(cases()))
def test_values_and_gradients_compile_and_keep_no_scores(chip, model, length, work):
    outcome = matrix.compile_case(matrix.CompileCase(chip, model, length, work))
    assert outcome.problem == ""
    assert {name.split("_")[2] for name in outcome.kernels} == {"fwd", "dq", "dkv"}


@pytest.mark.parametrize("model", ["olmoe_1b_7b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("chip", matrix.compilers.TPUS)
def test_decoding_copies_at_most_a_layer_of_the_cache(chip, model):
    """And nothing where no heads share keys, except for a TPU7x."""
    layers, rows, positions = 4, 64, 1024
    heads, kv_heads, channels, _ = matrix.HEADS[model]
    implementation = api.BY_PLATFORM["tpu"][0]

    def steps(query_LBHA, new_LBGA, keys, values, position_B):
        def step(layer, carried):
            mixed_BHA, *caches = carried
            new = query_LBHA[layer] + mixed_BHA, new_LBGA[layer], new_LBGA[layer]
            return api.cached_attention(*new, *caches, layer, position_B, 0.09, channels, implementation)

        return lax.fori_loop(0, layers, step, (jnp.zeros(query_LBHA.shape[1:], jnp.bfloat16), keys, values))

    new = shape(layers, rows, heads, channels), shape(layers, rows, kv_heads, channels)
    cache = shape(layers, rows, positions, kv_heads, channels)
    donating = jax.jit(steps, donate_argnums=(2, 3))
    program = matrix.compilers.compiled(chip, donating, *new, cache, cache, shape(rows, dtype=jnp.int32))
    layer_bytes = 2 * 2 * cache.size / layers  # keys and values
    most = 0.1 if model == "olmoe_1b_7b" and chip != "tpu7x" else 1.01
    assert program.memory_analysis().temp_size_in_bytes < most * layer_bytes
