"""The TPU kernels through the real compiler, for TPUs that are not there (`requirements-aot.txt` brings it).

    python -m pytest -m "aot and not slow" tests/aot/*_tpu.py    a few minutes: every chip, model and product once
    python -m pytest -m aot tests/aot/*_tpu.py                   an hour: at every number of tokens

A kernel whose blocks do not fit vector memory fails to compile. `benchmarks/compile_matrix.py` has the cases, and keeps
what came of them.
"""

import itertools

import jax.numpy as jnp
import pytest
from jax import lax

from moe_jax.kernels import quantized
from moe_jax.kernels.grouped_matmul import pallas_tpu
from tests import launcher_module

matrix = launcher_module.import_launcher("compile_matrix", "benchmarks")
compilers, shape = matrix.compilers, matrix.shape
pytestmark = pytest.mark.aot
IN_CI = {"olmoe_1b_7b": 1, "deepseek_v2_lite": 64, "qwen3_30b_a3b": 2048, "deepseek_v3": 512}


def cases():
    for chip in compilers.TPUS:
        for model, in_ci in IN_CI.items():
            for tokens in matrix.TOKENS:
                marks = () if tokens == in_ci else (pytest.mark.slow,)
                yield pytest.param(chip, model, tokens, marks=marks, id=f"{chip}-{model}-{tokens}")


@pytest.mark.parametrize(("chip", "model", "tokens"), list(cases()))
def test_products_compile_and_copy_no_weights(chip, model, tokens):
    for product in matrix.PRODUCTS:
        assert matrix.compile_case(matrix.CompileCase(chip, model, tokens, product)).problem == "", product


def eight_bit_cases():
    for chip, model, expert_dtype in itertools.product(compilers.TPUS, IN_CI, quantized.DTYPES):
        for tokens in (1, 2048):
            in_ci = chip == "v5e" and (model, tokens) in (("olmoe_1b_7b", 1), ("deepseek_v3", 2048))
            yield pytest.param(chip, model, expert_dtype, tokens, marks=() if in_ci else (pytest.mark.slow,))


@pytest.mark.parametrize(("chip", "model", "expert_dtype", "tokens"), list(eight_bit_cases()))
def test_weights_in_eight_bits_compile_and_are_not_copied(chip, model, expert_dtype, tokens):
    experts, layers = matrix.traffic.experts_of(model), matrix.LAYERS[model]

    def of_layers(rows, gate_up, down, sizes):
        def of_layer(layer, rows):
            hidden = pallas_tpu.gated(rows, gate_up, sizes, layer)
            return rows + pallas_tpu.forward(hidden, down, sizes, layer)

        return lax.fori_loop(0, layers, of_layer, rows)

    matrices = (2, experts.hidden, experts.d_model), (experts.d_model, experts.hidden)
    weights = [
        matrix.traffic.in_eight_bits(
            (layers, experts.num_experts, *one), expert_dtype, lambda sizes, dtype: shape(*sizes, dtype=dtype)
        )
        for one in matrices
    ]
    sizes, rows = shape(experts.num_experts, dtype=jnp.int32), shape(tokens * experts.k, experts.d_model)
    program = compilers.compiled(chip, of_layers, rows, *weights, sizes)
    assert len(compilers.mosaic_kernels(program)) == 2
    expert_bytes, row_bytes = sum(one.size for one in weights), 2 * rows.size
    assert program.memory_analysis().temp_size_in_bytes < matrix.MOST_TEMPORARIES * expert_bytes + 4 * row_bytes


@pytest.mark.parametrize("chip", compilers.TPUS)
def test_chips_have_as_many_cores_as_the_counter_of_traffic_says(chip):
    (device,) = compilers.device(chip).mesh.devices
    assert device.num_cores == matrix.traffic.CHIPS[chip].num_cores


@pytest.mark.parametrize("chip", compilers.TPUS)
def test_sixteen_layers_copy_no_weights(chip):
    experts = matrix.traffic.experts_of("olmoe_1b_7b")
    gate_up = shape(16, experts.num_experts, 2, experts.hidden, experts.d_model)
    down = shape(16, experts.num_experts, experts.d_model, experts.hidden)

    def layers(rows, gate_up, down, sizes):
        def of_layer(rows, layer):
            hidden = pallas_tpu.gated(rows, gate_up, sizes, layer)
            return rows + pallas_tpu.forward(hidden, down, sizes, layer), None

        return lax.scan(of_layer, rows, jnp.arange(16))[0]

    sizes = shape(experts.num_experts, dtype=jnp.int32)
    program = compilers.compiled(chip, layers, shape(64, experts.d_model), gate_up, down, sizes)
    expert_bytes = 2 * (gate_up.size + down.size)
    assert program.memory_analysis().temp_size_in_bytes < matrix.MOST_TEMPORARIES * expert_bytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", compilers.TPUS)
def test_shapes_that_fill_no_block_compile(chip, dtype):
    for rows, outputs, inputs in ((6, 40, 24), (203, 200, 100), (1000, 96, 384)):
        weights, sizes = shape(2, 8, outputs, inputs, dtype=dtype), shape(8, dtype=jnp.int32)
        x, out_grad = shape(rows, inputs, dtype=dtype), shape(rows, outputs, dtype=dtype)
        layer = shape(dtype=jnp.int32)
        compilers.compiled(chip, pallas_tpu.forward, x, weights, sizes, layer)
        gate_up = shape(2, 8, 2, outputs, inputs, dtype=dtype)
        compilers.compiled(chip, pallas_tpu.gated, x, gate_up, sizes, layer)
        compilers.compiled(chip, pallas_tpu.backward, x, weights, sizes, layer, out_grad)
