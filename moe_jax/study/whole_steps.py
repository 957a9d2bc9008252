"""Compiles whole steps of a model for devices that are not there; all arrays are abstract."""

import dataclasses
import functools
import math
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config.schema import Config, SamplingConfig
from moe_jax.cost.collectives import Collective, collectives
from moe_jax.engine import batch, generate, steps
from moe_jax.engine import cache as caches
from moe_jax.engine.request import make_requests
from moe_jax.model import formats, parameters
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import of_tree
from moe_jax.routing import policies
from moe_jax.study.topologies import Topology
from moe_jax.training import finetuning
from moe_jax.training.objective import Teacher
from moe_jax.training.step import Fixed, State, make_program

_TPU_KERNEL, _GPU_KERNEL = 'custom_call_target="tpu_custom_call"', 'custom_call_target="mosaic_gpu'


class Lowered(NamedTuple):
    """A step before it is compiled, and its largest arguments."""

    lowered: jax.stages.Lowered
    weights: Any  # abstract arrays with their places
    cache: Any


class CompiledStep(NamedTuple):
    """What the compiler says of a step, for each device."""

    weight_bytes: int
    cache_bytes: int
    other_bytes: int  # padding of both, other arguments and results, and the program itself
    temporary_bytes: int
    collectives: list[Collective]
    kernels: dict[str, int]  # our own, by name: how many calls
    seconds: float
    triton: bool  # whether products may be in Triton, see `Topology.compile`

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


def compile_step(step: Lowered, topology: Topology) -> CompiledStep:
    """Compiles a step.

    Raises:
        TooLargeError: a device has too little memory; in the compiler's words.
    """
    begin = time.perf_counter()
    try:
        program, triton = topology.compile(step.lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(str(error).splitlines()[0]) from error
    seconds = time.perf_counter() - begin
    memory, text = program.memory_analysis(), program.as_text()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    weights, cache = device_bytes(step.weights), device_bytes(step.cache)
    return CompiledStep(
        weights,
        cache,
        held + memory.generated_code_size_in_bytes - weights - cache,
        memory.temp_size_in_bytes,
        collectives(text),
        dict(Counter(kernels(text))),
        seconds,
        triton,
    )


def kernels(program: str) -> list[str]:
    """The names of the Pallas kernels in the text of a program, in its order; on a GPU, all are `mosaic_gpu`."""
    before, *calls = program.split(_TPU_KERNEL)
    parts = (before, *calls[:-1]) if calls else ()
    named = [re.findall(r"^ *(?:ROOT )?%(\w+)\S* = ", text, re.MULTILINE)[-1] for text in parts]
    return named + ["mosaic_gpu"] * program.count(_GPU_KERNEL)


def place_of(execution: Execution, topology: Topology) -> NamedSharding:
    """Where arrays lie that are whole on every device."""
    if execution.layout is not None:
        return execution.layout.replicated
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def params_of(execution: Execution, topology: Topology, dtype: jnp.dtype) -> Params:
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
    """A decode step of `rows` rows, whose caches have `positions`."""
    place = place_of(execution, topology)
    int32 = functools.partial(_int32, place=place)
    params = params_of(execution, topology, dtype)
    make = functools.partial(caches.allocate, multiple=execution.channel_multiple)
    cache = jax.eval_shape(functools.partial(make, execution.architecture, rows, positions, dtype))
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
    """A prefill of `rows` rows; the cache that it makes is an output."""
    place = place_of(execution, topology)
    int32 = functools.partial(_int32, place=place)
    params = params_of(execution, topology, dtype)
    given = params, int32(rows, prompt), int32(rows), int32(rows), int32(1), live_of(rows, execution, place)
    static = {"execution": execution, "memory": positions, "chunk": caches.CHUNK, "routing": False}
    lowered, layout = steps.prefill.lower(*given, **static), execution.layout
    slots = lowered.out_info[1]
    slots = abstract(slots, place if layout is None else steps.shardings_of(slots, layout))
    return Lowered(lowered, params, slots.cache)


@functools.cache
def _finetuning_shapes(config: Config) -> tuple[State, Params]:
    params = parameters.shapes(config.architecture, jnp.dtype(config.training.weights))
    return jax.eval_shape(functools.partial(finetuning.start, config), params)


def finetuning_state(config: Config, execution: Execution, topology: Topology) -> tuple[State, Fixed]:
    """The abstract state of a fine-tuning run, and what it does not change, on their devices."""
    place = place_of(execution, topology)

    def lie(tree):
        return abstract(tree, place if execution.layout is None else of_tree(tree, execution.layout))

    state, frozen = map(lie, _finetuning_shapes(config))
    teacher = None
    if config.objective.has_teacher:
        own, alone = finetuning.as_teacher(execution, config.training.batch_size)
        params = parameters.shapes(execution.architecture, jnp.dtype(config.training.weights))
        teacher = Teacher(lie(params), abstract(own, place), alone)
    return state, Fixed(frozen, teacher)


def lower_finetuning(config: Config, execution: Execution, topology: Topology) -> Lowered:
    """A fine-tuning step of a configuration; what it holds beside weights, as a cache, is the optimizer's."""
    training, place, architecture = config.training, place_of(execution, topology), execution.architecture
    policy = finetuning.trained_policy(config, architecture)
    live = policies.settings([policy] * training.batch_size, architecture, execution.k_max)
    kept = execution if config.finetune.elastic else finetuning.kept_experts(execution, live)
    state, fixed = finetuning_state(config, execution, topology)
    size = training.batch_size * training.accumulation, training.sequence_length
    packed = {f"{name}_BT": _int32(*size, place=place) for name in ("tokens", "labels", "segments", "positions")}
    scale = config.finetune.lora_alpha / config.finetune.lora_rank
    program = make_program(kept, training, config.objective, scale)
    lowered = program.lower(state, fixed, packed, abstract(live, place))
    teacher = None if fixed.teacher is None else fixed.teacher.params
    return Lowered(lowered, (state.params, state.biases, fixed.frozen, teacher), state.optimizer)


def device_numbers(tree: Any) -> int:
    """Of abstract arrays with their places, the numbers that one device holds."""
    return sum(math.prod(_shard_shape(leaf)) for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Of abstract arrays with their places, what one device holds."""
    return sum(math.prod(_shard_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape)
