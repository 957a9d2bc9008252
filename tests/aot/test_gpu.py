"""The Hopper kernels through the real compiler, for an H100 that is not there.

pip install -r requirements-aot-gpu.txt    in an environment of its own: other processes of JAX would warn there
python -m pytest -m "aot and not slow" tests/aot/test_gpu.py    2 minutes: every model and product once
python -m pytest -m aot tests/aot/test_gpu.py                   at every number of tokens
"""

import functools
import importlib.util
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.kernels.grouped_matmul import pallas_gpu
from tests import launcher_module

benchmark = launcher_module.import_launcher("traffic", "benchmarks")
pytestmark = pytest.mark.aot
TARGET = pathlib.Path(__file__).parent / "h100.txtpb"
TOKENS = (1, 8, 64, 512, 2048, 8192)
LAYERS = {"olmoe_1b_7b": 16, "deepseek_v2_lite": 16, "qwen3_30b_a3b": 16, "deepseek_v3": 2}  # as many as a chip holds
IN_CI = {"olmoe_1b_7b": 1, "deepseek_v2_lite": 64, "qwen3_30b_a3b": 2048, "deepseek_v3": 512}
SHARED_BYTES = 227 * 1024  # of a block, in NVIDIA's Hopper Tuning Guide
MOST_TEMPORARIES = 0.01  # of the bytes of the experts


def cases():
    for model, in_ci in IN_CI.items():
        for tokens in TOKENS:
            marks = () if tokens == in_ci else (pytest.mark.slow,)
            yield pytest.param(model, tokens, marks=marks, id=f"{model}-{tokens}")


@functools.cache
def one_device():
    tools = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    if tools is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.fail("expected JAX's CUDA plugin and nvcc: pip install -r requirements-aot-gpu.txt", pytrace=False)
    os.environ["PATH"] = os.pathsep.join(
        [*(f"{folder}/bin" for folder in tools.submodule_search_locations), os.environ["PATH"]]
    )
    jax.config.update("jax_platforms", "cpu")  # otherwise the plugin asks for cuDNN, which only a device needs
    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET.read_text(), topology="1x1x1")
    assert topology.devices[0].compute_capability == "9.0"
    return NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())


def compiled(function, *arguments):
    """Compiles without trying variants, which needs a device."""
    sharding = one_device()
    lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments)
    return lowered.compile({"xla_gpu_autotune_level": 0})


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shared_bytes(jaxpr):
    """Of each Mosaic GPU kernel in a program: what it reserves in shared memory, barriers of 8 bytes included."""
    found = []
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda one: hasattr(one, "eqns") or hasattr(one, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if not hasattr(inner, "eqns"):
                continue
            if equation.primitive.name == "run_scoped":
                own = [one.aval for one in inner.invars if str(getattr(one.aval, "memory_space", "")) == "smem"]
                if own:
                    found.append(sum(math.prod(one.shape) * getattr(one.dtype, "itemsize", 8) for one in own))
            else:
                found += shared_bytes(inner)
    return found


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
        (shared,) = shared_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)
        assert 0 < shared <= SHARED_BYTES, name
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
    assert shared_bytes(jax.make_jaxpr(call)(*arguments).jaxpr)[0] > SHARED_BYTES
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        compiled(call, *arguments)
