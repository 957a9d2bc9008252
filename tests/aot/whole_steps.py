"""Whole steps of OLMoE-1B-7B's published shape, compiled for a chip that is not there; all arrays are abstract."""

import functools
import pathlib

import jax
import jax.numpy as jnp

from moe_jax.config import gin
from moe_jax.config.schema import SamplingConfig
from moe_jax.engine import batch, steps
from moe_jax.engine import cache as caches
from moe_jax.engine.request import make_requests
from moe_jax.kernels import chooser
from moe_jax.model import decoder, parameters
from tests import launcher_module

compilers = launcher_module.import_launcher("compilers", "benchmarks")
shape = compilers.shape
MODEL = pathlib.Path(__file__).parents[2] / "configs" / "models" / "olmoe_1b_7b.gin"


@functools.cache
def execution(chip, num_layers=16):
    architecture = gin.read_config(MODEL, [f"decoder.num_layers={num_layers}"]).architecture
    kernels = chooser.resolve("gpu" if chip == "h100" else "tpu", architecture, "bfloat16")
    return decoder.Execution(architecture, architecture.moe.k, kernels)


def params_of(how):
    return parameters.shapes(how.architecture, jnp.bfloat16)


def live_of(rows, how):
    (request,) = make_requests([[0]], None, how, sampling=SamplingConfig())
    return batch.live_of([request] * rows, rows, how)


def most_temporaries(chip):
    """1% of the bytes of the experts."""
    return 0.01 * 2 * parameters.count(execution(chip).architecture, parameters.is_routed)


def int32(*sizes):
    return shape(*sizes, dtype=jnp.int32)


def decode(chip, rows, memory=1024):
    """The compiled decode step, and the bytes of one layer's cache."""
    how = execution(chip)
    cache = jax.eval_shape(functools.partial(caches.allocate, how.architecture, rows, memory, jnp.bfloat16))
    slots = steps.CacheSlots(cache, *(int32(rows) for _ in range(3)))
    given = params_of(how), slots, shape(rows, dtype=bool), int32(), int32(1), live_of(rows, how)
    program = compilers.compiled(chip, steps.decode, *given, execution=how, most=8, routing=False)
    return program, sum(2 * array.size for array in jax.tree.leaves(cache)) / how.architecture.decoder.num_layers


def prefill(chip, tokens):
    """The compiled prefill, and the bytes of sorted rows and of gated rows, of each token k."""
    how = execution(chip)
    given = params_of(how), int32(1, tokens), int32(1), int32(1), int32(1), live_of(1, how)
    settings = {"memory": tokens, "chunk": caches.CHUNK, "routing": False}
    program = compilers.compiled(chip, steps.prefill, *given, execution=how, **settings)
    moe, d_model = how.architecture.moe, how.architecture.decoder.d_model
    return program, 2 * tokens * moe.k * d_model, 2 * tokens * moe.k * moe.expert_hidden
