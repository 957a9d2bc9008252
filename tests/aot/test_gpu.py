"""The Hopper kernels through the real compiler, for an H100 that is not there.

pip install -r requirements-aot-gpu.txt    in an environment of its own: other processes of JAX would warn there
python -m pytest -m "aot and not slow" tests/aot/test_gpu.py    2 minutes: every model and product once
python -m pytest -m aot tests/aot/test_gpu.py                   at every number of tokens
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from moe_jax.kernels.grouped_matmul import pallas_gpu
from tests import launcher_module
from tests.aot import h100
from tests.aot.h100 import compiled, shape

benchmark = launcher_module.import_launcher("traffic", "benchmarks")
pytestmark = pytest.mark.aot
TOKENS = (1, 8, 64, 512, 2048, 8192)
LAYERS = {"olmoe_1b_7b": 16, "deepseek_v2_lite": 16, "qwen3_30b_a3b": 16, "deepseek_v3": 2}  # as many as a chip holds
IN_CI = {"olmoe_1b_7b": 1, "deepseek_v2_lite": 64, "qwen3_30b_a3b": 2048, "deepseek_v3": 512}
MOST_TEMPORARIES = 0.01  # of the bytes of the experts


def cases():
    for model, in_ci in IN_CI.items():
        for tokens in TOKENS:
            marks = () if tokens == in_ci else (pytest.mark.slow,)
            yield pytest.param(model, tokens, marks=marks, id=f"{model}-{tokens}")


def product_of(product, experts, layers):
    """A function and the shapes of its arguments."""
    rows, other_rows, sizes = shape(*product.rows), shape(*product.other_rows), shape(experts, dtype=jnp.int32)
    if product.to_weights:
        return pallas_gpu.weights_gradient, (rows, shape(1, experts, *product.matrices[1:]), sizes, other_rows)
    matrices = product.matrices if product.matrices[0] == 2 else product.matrices[1:]
    function = pallas_gpu.gated if product.matrices[0] == 2 else pallas_gpu.forward
    if product.transposed:
        function = pallas_gpu.rows_gradient
    return function, (rows, shape(layers, experts, *matrices), sizes, shape(dtype=jnp.int32))


def rows_bytes(*shapes):
    return sum(2 * math.prod(one) for one in shapes)


@pytest.mark.parametrize(("model", "tokens"), list(cases()))
def test_products_compile_and_copy_no_weights(model, tokens):
    """Temporaries of a gradient to weights are copies of each expert's first and last block of rows."""
    experts = benchmark.experts_of(model)
    for name, product in benchmark.products(experts, tokens * experts.k).items():
        function, arguments = product_of(product, experts.num_experts, LAYERS[model])
        program = compiled(function, *arguments)
        assert "mosaic_gpu" in program.as_text(), name
        (shared,) = h100.shared_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)
        assert 0 < shared <= h100.SHARED_BYTES, name
        temporaries = program.memory_analysis().temp_size_in_bytes
        expert_bytes = 2 * LAYERS[model] * experts.num_experts * math.prod(product.matrices)
        if product.to_weights:
            width = product.rows[1] + product.other_rows[1]
            edges = rows_bytes((experts.num_experts * 2 * pallas_gpu.MANY.depth, width))
            assert temporaries <= edges + rows_bytes(product.rows, product.other_rows) + 2**20, name
        else:
            assert temporaries < MOST_TEMPORARIES * expert_bytes, name


def test_tiles_beyond_shared_memory_are_refused():
    arguments = shape(64, 2048), shape(2, 64, 1024, 2048), shape(64, dtype=jnp.int32), shape(dtype=jnp.int32)
    call = functools.partial(pallas_gpu.forward, tiles=pallas_gpu.FEW._replace(stages=5))
    assert h100.shared_bytes(jax.make_jaxpr(call)(*arguments).jaxpr)[0] > h100.SHARED_BYTES
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        compiled(call, *arguments)
