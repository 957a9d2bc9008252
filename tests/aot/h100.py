"""The real compiler for an H100 that is not there (`requirements-aot-gpu.txt` brings it)."""

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

TARGET = pathlib.Path(__file__).parent / "h100.txtpb"
SHARED_BYTES = 227 * 1024  # of a block, in NVIDIA's Hopper Tuning Guide


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


def compiled(function, *arguments, **static):
    """Compiles for abstract arguments, without timing variants, which needs a device."""

    def on_device(argument):
        return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=one_device())

    jitted = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*jax.tree.map(on_device, arguments), **static)
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
