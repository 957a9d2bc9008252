"""The TPU kernels through the real compiler, for TPUs that are not there (`requirements-aot.txt` brings it).

    python -m pytest -m "aot and not slow" tests/aot     a few minutes: every chip, model and product once
    python -m pytest -m aot tests/aot                    an hour: at every number of tokens

A kernel whose blocks do not fit vector memory fails to compile.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.kernels.grouped_matmul import pallas_tpu
from tests import launcher_module

benchmark = launcher_module.import_launcher("traffic", "benchmarks")
pytestmark = pytest.mark.aot
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TOKENS = (1, 8, 64, 512, 2048, 8192)
LAYERS = {"olmoe_1b_7b": 16, "deepseek_v2_lite": 16, "qwen3_30b_a3b": 16, "deepseek_v3": 2}  # as many as a chip holds
IN_CI = {"olmoe_1b_7b": 1, "deepseek_v2_lite": 64, "qwen3_30b_a3b": 2048, "deepseek_v3": 512}
MOST_TEMPORARIES = 0.01  # of the bytes of the experts


def cases():
    for chip in TOPOLOGIES:
        for model, in_ci in IN_CI.items():
            for tokens in TOKENS:
                marks = () if tokens == in_ci else (pytest.mark.slow,)
                yield pytest.param(chip, model, tokens, marks=marks, id=f"{chip}-{model}-{tokens}")


@functools.cache
def one_device(chip):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so processes need not take turns
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    assert topology.devices[0].num_cores == benchmark.CHIPS[chip].num_cores
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def compiled(chip, function, *arguments):
    sharding = one_device(chip)
    return jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments).compile()


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def product_of(product, experts, layers):
    """A function and the shapes of its arguments."""
    rows, other_rows, sizes = shape(*product.rows), shape(*product.other_rows), shape(experts, dtype=jnp.int32)
    if product.to_weights:
        return pallas_tpu.weights_gradient, (rows, sizes, other_rows)
    matrices = product.matrices if product.matrices[0] == 2 else product.matrices[1:]
    function = pallas_tpu.gated if product.matrices[0] == 2 else pallas_tpu.forward
    if product.transposed:
        function = pallas_tpu.rows_gradient
    return function, (rows, shape(layers, experts, *matrices), sizes, shape(dtype=jnp.int32))


@pytest.mark.parametrize(("chip", "model", "tokens"), list(cases()))
def test_products_compile_and_copy_no_weights(chip, model, tokens):
    experts = benchmark.experts_of(model)
    for name, product in benchmark.products(experts, tokens * experts.k).items():
        function, arguments = product_of(product, experts.num_experts, LAYERS[model])
        call = functools.partial(function, num_cores=benchmark.CHIPS[chip].num_cores)
        program = compiled(chip, call, *arguments)
        assert "tpu_custom_call" in program.as_text(), name
        layers = 1 if product.to_weights else LAYERS[model]
        expert_bytes = 2 * layers * experts.num_experts * np.prod(product.matrices)
        assert program.memory_analysis().temp_size_in_bytes < MOST_TEMPORARIES * expert_bytes, name


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_sixteen_layers_copy_no_weights(chip):
    experts = benchmark.experts_of("olmoe_1b_7b")
    gate_up = shape(16, experts.num_experts, 2, experts.hidden, experts.d_model)
    down = shape(16, experts.num_experts, experts.d_model, experts.hidden)

    def layers(rows, gate_up, down, sizes):
        def of_layer(rows, layer):
            hidden = pallas_tpu.gated(rows, gate_up, sizes, layer)
            return rows + pallas_tpu.forward(hidden, down, sizes, layer), None

        return lax.scan(of_layer, rows, jnp.arange(16))[0]

    sizes = shape(experts.num_experts, dtype=jnp.int32)
    program = compiled(chip, layers, shape(64, experts.d_model), gate_up, down, sizes)
    expert_bytes = 2 * (gate_up.size + down.size)
    assert program.memory_analysis().temp_size_in_bytes < MOST_TEMPORARIES * expert_bytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_shapes_that_fill_no_block_compile(chip, dtype):
    for rows, outputs, inputs in ((6, 40, 24), (203, 200, 100), (1000, 96, 384)):
        weights, sizes = shape(2, 8, outputs, inputs, dtype=dtype), shape(8, dtype=jnp.int32)
        x, out_grad = shape(rows, inputs, dtype=dtype), shape(rows, outputs, dtype=dtype)
        layer = shape(dtype=jnp.int32)
        compiled(chip, pallas_tpu.forward, x, weights, sizes, layer)
        compiled(chip, pallas_tpu.gated, x, shape(2, 8, 2, outputs, inputs, dtype=dtype), sizes, layer)
        compiled(chip, pallas_tpu.backward, x, weights, sizes, layer, out_grad)
