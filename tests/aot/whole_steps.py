"""Whole steps of published shapes, compiled for devices that are not there; all arrays are abstract."""

import functools
import pathlib

import jax.numpy as jnp

from moe_jax.config import gin
from moe_jax.engine.request import execution_of
from moe_jax.model import parameters
from moe_jax.model.sharding import layout_of
from moe_jax.study import topologies, whole_steps
from tests import launcher_module

compilers = launcher_module.import_launcher("compilers", "benchmarks")
MODELS = pathlib.Path(__file__).parents[2] / "configs" / "models"
DTYPE = jnp.dtype("bfloat16")


@functools.cache
def execution(topology, model="olmoe_1b_7b", mesh=None, num_layers=0):
    """Of a model on a mesh of the devices of a topology; None: on one of them."""
    overrides = [f"decoder.num_layers={num_layers}"] if num_layers else []
    architecture = gin.read_config(MODELS / f"{model}.gin", overrides).architecture
    found = topologies.find(topology)
    layout = layout_of(mesh, architecture, found.devices)
    return execution_of(architecture, dtype=DTYPE.name, layout=layout, platform=found.platform)


def most_temporaries(how):
    """1% of the bytes of the experts of one device."""
    size = parameters.count(how.architecture, parameters.is_routed)
    parts = 1 if how.layout is None else how.layout.config.expert_parts * how.layout.config.tensor
    return 0.01 * DTYPE.itemsize * size / parts


@functools.cache
def decode(topology, how, rows, positions=1024):
    found = topologies.find(topology)
    return whole_steps.compile_step(whole_steps.lower_decode(how, found, rows, positions, DTYPE), found)


def prefill(topology, how, tokens, rows=1):
    found = topologies.find(topology)
    return whole_steps.compile_step(whole_steps.lower_prefill(how, found, rows, tokens, tokens, DTYPE), found)


def attention_bytes(how):
    """Of the matrices of attention in one layer, whole."""
    size = parameters.count(how.architecture, lambda one: one.modules == ("moe", "attention"))
    return DTYPE.itemsize * size / how.architecture.decoder.num_moe_layers


def slot_bytes(how, tokens):
    """Of sorted rows, and of gated rows: of each token k."""
    moe = how.architecture.moe
    slots = DTYPE.itemsize * tokens * moe.k
    return slots * how.architecture.decoder.d_model, slots * moe.expert_hidden
