"""Compiles whole steps of a model for devices that are not there; all arrays are abstract."""

from collections import Counter
import dataclasses
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config.schema import SamplingConfig
from moe_jax.cost.collectives import Collective, collectives
from moe_jax.engine import batch, generate, steps
from moe_jax.engine import cache as caches
from moe_jax.engine.request import make_requests
from moe_jax.model import formats, parameters
from moe_jax.model.execution import Execution
from moe_jax.study.topologies import Topology

_KERNEL = re.compile(r'custom_call_target="((?:tpu_custom_call|mosaic_gpu)\w*)')


class Lowered(NamedTuple):
    """A step before it is compiled, and its largest arguments."""

    lowered: jax.stages.Lowered
    weights: Any  # abstract arrays with their places
    cache: Any


class Compiled(NamedTuple):
    """What the compiler says of a step, for each device."""

    weight_bytes: int
    cache_bytes: int
    other_bytes: int  # padding of both, other arguments and results, and the program itself
    temporary_bytes: int
    collectives: list[Collective]
    kernels: dict[str, int]  # by the compiler's name of their calls: how many
    seconds: float

    @property
    def needed_bytes(self) -> int:
        """All that a device must hold."""
        return self.weight_bytes + self.cache_bytes + self.other_bytes + self.temporary_bytes

    @property
    def sent_bytes(self) -> float:
        """By all collectives."""
        return sum(one.times * one.sent_bytes for one in self.collectives)


class TooLargeError(Exception):
    """The compiler found that a step takes more memory than a device has."""


def compile_step(step: Lowered, topology: Topology) -> Compiled:
    """Compiles a step.

    Raises:
        TooLargeError: a device has too little memory; in the compiler's words.
    """
    begin = time.perf_counter()
    try:
        program = step.lowered.compile(topology.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(str(error).splitlines()[0]) from error
    seconds = time.perf_counter() - begin
    memory, text = program.memory_analysis(), program.as_text()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    weights, cache = device_bytes(step.weights), device_bytes(step.cache)
    return Compiled(
        weights,
        cache,
        held + memory.generated_code_size_in_bytes - weights - cache,
        memory.temp_size_in_bytes,
        collectives(text),
        dict(Counter(_KERNEL.findall(text))),
        seconds,
    )


def place_of(execution: Execution, topology: Topology) -> NamedSharding:
    """Where arrays lie that are whole on every device."""
    if execution.layout is not None:
        return execution.layout.replicated
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def params_of(execution: Execution, topology: Topology, dtype: jnp.dtype) -> Any:
    """The abstract parameters of a model, on their devices as an `Engine` has them."""
    layout, place = execution.layout, place_of(execution, topology)

    def put(path, leaf):
        sharding = place if layout is None else layout.of_leaf(path, leaf)
        order = formats.of_parameter(parameters.find_key(path), sharding, topology.platform)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=order)

    return jax.tree_util.tree_map_with_path(put, parameters.shapes(execution.architecture, dtype))


def live_of(rows: int, execution: Execution, place: NamedSharding) -> batch.Live:
    """Abstract settings of greedy requests that keep the model's own experts."""
    here = dataclasses.replace(execution, layout=None)
    (request,) = make_requests([[0]], None, here, sampling=SamplingConfig())
    return abstract(batch.live_of([request] * rows, rows, here), place)


def abstract(tree: Any, place: NamedSharding | Any) -> Any:
    """Arrays as their shapes, in one place or each in its own."""
    places = jax.tree.map(lambda _: place, tree) if isinstance(place, NamedSharding) else place
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, places
    )


def _int32(*sizes: int, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=place)


def lower_decode(execution: Execution, topology: Topology, rows: int, positions: int, dtype: jnp.dtype) -> Lowered:
    """A decode step of so many rows, whose caches have so many positions."""
    place = place_of(execution, topology)
    int32 = functools.partial(_int32, place=place)
    params = params_of(execution, topology, dtype)
    cache = jax.eval_shape(functools.partial(caches.allocate, execution.architecture, rows, positions, dtype))
    slots = steps.CacheSlots(cache, *(int32(rows) for _ in range(3)))
    layout = execution.layout
    slots = abstract(slots, place if layout is None else steps.shardings_of(slots, layout))
    alive_B = jax.ShapeDtypeStruct((rows,), bool, sharding=place)
    given = params, slots, alive_B, int32(), int32(1), live_of(rows, execution, place)
    static = {"execution": execution, "most": generate.STEPS_OF_SEVERAL, "routing": False}
    return Lowered(steps.decode.lower(*given, **static), params, slots.cache)


def lower_prefill(
    execution: Execution, topology: Topology, rows: int, prompt: int, positions: int, dtype: jnp.dtype
) -> Lowered:
    """A prefill of so many rows; the cache that it makes is an output."""
    place = place_of(execution, topology)
    int32 = functools.partial(_int32, place=place)
    params = params_of(execution, topology, dtype)
    given = params, int32(rows, prompt), int32(rows), int32(rows), int32(1), live_of(rows, execution, place)
    static = {"execution": execution, "memory": positions, "chunk": caches.CHUNK, "routing": False}
    lowered, layout = steps.prefill.lower(*given, **static), execution.layout
    slots = lowered.out_info[1]
    slots = abstract(slots, place if layout is None else steps.shardings_of(slots, layout))
    return Lowered(lowered, params, slots.cache)


def device_bytes(tree: Any) -> int:
    """Of abstract arrays with their places, what one device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
