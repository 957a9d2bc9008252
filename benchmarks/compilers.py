"""Single kernels through the real compilers for chips that are not there: four TPUs and an H100."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.study import topologies, whole_steps

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHARED_BYTES = 227 * 1024  # of a block, in NVIDIA's Hopper Tuning Guide


def topology(chip: str) -> topologies.Topology:
    """The smallest topology of a chip; the H100 must be asked for before any array is made.

    Raises:
        NoCompilerError: its compiler is not installed.
    """
    return topologies.find(TPUS.get(chip, f"{chip}:1"))


@functools.cache
def device(chip: str) -> NamedSharding:
    """One chip as the place of whole arrays; errors are those of `topology`."""
    return NamedSharding(Mesh(np.array(topology(chip).devices[:1]), ("x",)), PartitionSpec())


def compiled(chip: str, function, *arguments, **static):
    """Compiles for abstract arguments."""
    place = device(chip)

    def on_device(argument):
        return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=place)

    jitted = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*jax.tree.map(on_device, arguments), **static)
    program, _ = topology(chip).compile(lowered)
    return program


def shape(*sizes, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def mosaic_kernels(program) -> list[tuple[str, int]]:
    """Of each Mosaic kernel in a program for a TPU: its name, and the vector memory that the compiler gave it."""
    text = program.as_text()
    calls = text.split('custom_call_target="tpu_custom_call"')[1:]
    given = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    return [(name, int(re.search(given, call)[1])) for name, call in zip(whole_steps.kernels(text), calls)]


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
