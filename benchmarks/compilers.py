"""The real compilers for chips that are not there: four TPUs and an H100.

`requirements-aot.txt` brings the one for TPUs, `requirements-aot-gpu.txt` the one for the H100. Each in an environment
of its own: other processes of JAX would warn beside the second.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TARGET = pathlib.Path(__file__).parent / "h100.txtpb"
SHARED_BYTES = 227 * 1024  # of a block, in NVIDIA's Hopper Tuning Guide


class NoCompilerError(Exception):
    """Says in one line what to install."""


def versions(chip: str) -> dict[str, str]:
    """The versions of what compiles for a chip."""
    names = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc") if chip == "h100" else ("jax", "libtpu")
    return {name: importlib.metadata.version(name) for name in names}


@functools.cache
def device(chip: str) -> NamedSharding:
    """One chip as the place of whole arrays; the H100 must be asked for before any array is made.

    Raises:
        NoCompilerError: its compiler is not installed.
    """
    topology = _h100() if chip == "h100" else _tpu(chip)
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def _tpu(chip):
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompilerError("expected libtpu: pip install -r requirements-aot.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so processes need not take turns
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip])


def _h100():
    tools = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    if tools is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise NoCompilerError("expected JAX's CUDA plugin and nvcc: pip install -r requirements-aot-gpu.txt")
    os.environ["PATH"] = os.pathsep.join(
        [*(f"{folder}/bin" for folder in tools.submodule_search_locations), os.environ["PATH"]]
    )
    jax.config.update("jax_platforms", "cpu")  # otherwise the plugin asks for cuDNN, which only a device needs
    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET.read_text(), topology="1x1x1")
    assert topology.devices[0].compute_capability == "9.0"
    return topology


def compiled(chip: str, function, *arguments, **static):
    """Compiles for abstract arguments; for the H100 without timing variants, which needs a device."""
    place = device(chip)

    def on_device(argument):
        return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=place)

    jitted = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*jax.tree.map(on_device, arguments), **static)
    return lowered.compile({"xla_gpu_autotune_level": 0} if chip == "h100" else None)


def shape(*sizes, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def mosaic_kernels(program) -> list[tuple[str, int]]:
    """Of each Mosaic kernel in a program for a TPU: its name, and the vector memory that the compiler gave it."""
    before, *calls = program.as_text().split('custom_call_target="tpu_custom_call"')
    names = [re.findall(r"^ *(?:ROOT )?%(\w+)\S* = ", text, re.MULTILINE)[-1] for text in (before, *calls[:-1])]
    given = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    return [(name, int(re.search(given, call)[1])) for name, call in zip(names, calls)]


def shared_bytes(jaxpr) -> list[int]:
    """Of each Mosaic GPU kernel in a jaxpr: what it reserves in shared memory, barriers of 8 bytes included."""
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
