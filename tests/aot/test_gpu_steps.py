"""Whole steps of OLMoE-1B-7B through the real compiler for an H100, with the Hopper kernels inside.

Run as `test_gpu.py`. All arrays are abstract.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import gin
from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.config.schema import SamplingConfig
from moe_jax.engine import batch, steps
from moe_jax.engine import cache as caches
from moe_jax.engine.request import make_requests
from moe_jax.kernels import chooser
from moe_jax.model import decoder, parameters
from moe_jax.training.objective import objective
from tests.aot import cached_attention as cached
from tests.aot.h100 import compiled, one_device, shape

pytestmark = pytest.mark.aot
MODEL = pathlib.Path(__file__).parents[2] / "configs" / "models" / "olmoe_1b_7b.gin"
MOST_TEMPORARIES = 0.01  # of the bytes of the experts


@pytest.fixture(autouse=True)
def target():
    """Before any array is made: then it is too late to find the compiler."""
    one_device()


@functools.cache
def execution(num_layers=16):
    architecture = gin.read_config(MODEL, [f"decoder.num_layers={num_layers}"]).architecture
    kernels = chooser.resolve("gpu", architecture, "bfloat16", {"grouped_matmul": "pallas_gpu"})
    return decoder.Execution(architecture, architecture.moe.k, kernels)


def params_of(num_layers=16):
    return parameters.shapes(execution(num_layers).architecture, jnp.bfloat16)


def live_of(rows):
    (request,) = make_requests([[0]], None, execution(), sampling=SamplingConfig())
    return batch.live_of([request] * rows, rows, execution())


def expert_bytes():
    return 2 * parameters.count(execution().architecture, parameters.is_routed)


def slots_of(rows, memory):
    cache = jax.eval_shape(functools.partial(caches.allocate, execution().architecture, rows, memory, jnp.bfloat16))
    return steps.CacheSlots(cache, *(shape(rows, dtype=jnp.int32) for _ in range(3)))


def int32(*sizes):
    return shape(*sizes, dtype=jnp.int32)


@pytest.mark.parametrize("rows", [1, 64])
def test_decode_steps_copy_neither_weights_nor_cache(rows):
    slots = slots_of(rows, 1024)
    given = params_of(), slots, shape(rows, dtype=bool), int32(), int32(1), live_of(rows)
    program = compiled(steps.decode, *given, execution=execution(), most=8, routing=False)
    assert "mosaic_gpu" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < MOST_TEMPORARIES * expert_bytes()


def test_decoding_attends_to_the_cache_where_it_lies():
    """64 rows: beside scores, nothing is held that is near a layer's keys in size."""
    call = jax.jit(cached.steps("sums"), donate_argnums=(3, 4))
    temporaries = compiled(call, *cached.operands("olmoe_1b_7b", shape)).memory_analysis().temp_size_in_bytes
    assert temporaries < cached.layer_bytes("olmoe_1b_7b") / 4


def test_prefill_copies_no_weights():
    """Beside sorted rows, gated rows and results, of each token k."""
    tokens, moe = 2048, execution().architecture.moe
    given = params_of(), int32(1, tokens), int32(1), int32(1), int32(1), live_of(1)
    program = compiled(steps.prefill, *given, execution=execution(), memory=tokens, chunk=caches.CHUNK, routing=False)
    assert "mosaic_gpu" in program.as_text()
    activations = 2 * tokens * moe.k * (2 * execution().architecture.decoder.d_model + moe.expert_hidden)
    assert program.memory_analysis().temp_size_in_bytes < activations + MOST_TEMPORARIES * expert_bytes()


def test_gradient_of_a_training_step():
    layers, rows, length = 2, 1, 512
    packed = {f"{name}_BT": int32(rows, length) for name in ("tokens", "labels", "segments", "positions")}

    def gradient(params, packed, live):
        def loss(params):
            return objective(params, packed, live, execution(layers), ObjectiveConfig(), 0.01)

        return jax.value_and_grad(loss, has_aux=True)(params)

    live = live_of(rows).policy
    live = jax.tree.map(lambda x: x[..., :layers] if x.shape[-1:] == (16,) else x, live)
    program = compiled(gradient, params_of(layers), packed, live)
    assert program.as_text().count("mosaic_gpu") >= 5  # gate and up, down, and their gradients
