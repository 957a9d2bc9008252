"""The Hopper kernels through the real compiler, for an H100 that is not there.

pip install -r requirements-aot-gpu.txt    in an environment of its own: other processes of JAX would warn there
python -m pytest -m "aot and not slow" tests/aot/test_gpu.py    2 minutes: every model and product once
python -m pytest -m aot tests/aot/test_gpu.py                   at every number of tokens

`benchmarks/compile_matrix.py` has the cases, and keeps what came of them.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax.kernels.grouped_matmul import pallas_gpu
from tests import launcher_module
from tests.aot import cached

matrix = launcher_module.import_launcher("compile_matrix", "benchmarks")
compilers, shape = matrix.compilers, matrix.shape
pytestmark = pytest.mark.aot
IN_CI = {"olmoe_1b_7b": 1, "deepseek_v2_lite": 64, "qwen3_30b_a3b": 2048, "deepseek_v3": 512}


def cases():
    for model, in_ci in IN_CI.items():
        for tokens in matrix.TOKENS:
            marks = () if tokens == in_ci else (pytest.mark.slow,)
            yield pytest.param(model, tokens, marks=marks, id=f"{model}-{tokens}")


@pytest.mark.parametrize(("model", "tokens"), list(cases()))
def test_products_compile_and_copy_no_weights(model, tokens):
    """Temporaries of a gradient to weights are copies of each expert's first and last block of rows."""
    for product in matrix.PRODUCTS:
        assert matrix.compile_case(matrix.CompileCase("h100", model, tokens, product)).problem == "", product


@pytest.mark.parametrize("product", ["gated", "forward", "rows_gradient"])
@pytest.mark.parametrize("rows", [8, 512, 65536])
def test_all_tiles_worth_timing_fit_into_shared_memory(rows, product):
    halves = (2, 1024) if product == "gated" else (2048,)
    arguments = shape(rows, 2048), shape(2, 64, *halves, 2048), shape(64, dtype=jnp.int32), shape(dtype=jnp.int32)
    for tiles in pallas_gpu.candidates(product, rows, 64):
        call = functools.partial(getattr(pallas_gpu, product), tiles=tiles)
        assert 0 < compilers.shared_bytes(jax.make_jaxpr(call)(*arguments).jaxpr)[0] <= compilers.SHARED_BYTES


@pytest.mark.parametrize(
    ("heads", "rows", "positions", "most"),
    [
        ((16, 16, 128, 128), 1, 4096, 0.1),  # OLMoE
        ((32, 4, 128, 128), 64, 1024, 0.2),  # Qwen3-30B-A3B: scores and shares of 8 heads for each of keys
        ((16, 1, 576, 512), 64, 1024, 1.1),  # V2-Lite: latents are multiplied by matrices
    ],
)
def test_decoding_copies_no_keys_and_values_and_latents_once(heads, rows, positions, most):
    assert cached.temporaries("h100", heads, rows, positions) < most


def test_tiles_beyond_shared_memory_are_refused():
    arguments = shape(64, 2048), shape(2, 64, 1024, 2048), shape(64, dtype=jnp.int32), shape(dtype=jnp.int32)
    call = functools.partial(pallas_gpu.forward, tiles=pallas_gpu.FEW._replace(stages=5))
    assert compilers.shared_bytes(jax.make_jaxpr(call)(*arguments).jaxpr)[0] > compilers.SHARED_BYTES
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        compilers.compiled("h100", call, *arguments)
