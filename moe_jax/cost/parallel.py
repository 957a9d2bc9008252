"""The least work of one device of a mesh in a step, what it sends, and the least time that follows.

Experts are chosen evenly and independently. What a device must read and multiply is counted as in `roofline`, of its
own part. Collectives come between operations that need each other, so their time is added.
"""

import math
from typing import NamedTuple

from moe_jax.config.architecture import Architecture
from moe_jax.cost.chips import ChipPeaks
from moe_jax.cost.roofline import Work, cached_numbers, expected_distinct, floor_s, mixed_numbers
from moe_jax.dispatch import choose
from moe_jax.model import parameters
from moe_jax.model.execution import Execution
from moe_jax.model.parameters import Matrix, Parameter
from moe_jax.model.sharding import Layout

_FLOAT32 = 4  # bytes
START_S = 5e-6  # until a collective has started: assumed, as `dispatch.choose` does, and measured on no device


class StepShape(NamedTuple):
    """A step: every row has as many tokens."""

    rows: int
    new: int  # tokens of each row
    cached: int  # tokens of each row in the cache before the step
    k: int  # active experts, at most; layers with fewer have those


class Share(NamedTuple):
    """A step, for one device."""

    work: Work
    sent_bytes: float
    collectives: int

    def floor_s(self, chip: ChipPeaks) -> float:
        """The longer of moving and computing, and the time of the links."""
        return floor_s(self.work, chip.machine) + self.sent_bytes / chip.link_bytes_per_s

    def estimate_s(self, chip: ChipPeaks) -> float:
        """The floor, and the starts of the collectives."""
        return self.floor_s(chip) + START_S * self.collectives


def shard_size(parameter: Parameter, architecture: Architecture, layout: Layout | None, gathered: bool = False) -> int:
    """The numbers of a parameter that one device has; `gathered`: while its layer runs."""
    shape = parameter.shape(architecture)
    return math.prod(shape if layout is None else layout.of_parameter(parameter, gathered).shard_shape(shape))


def weight_bytes(architecture: Architecture, layout: Layout | None, itemsize: int, gathered: bool = False) -> int:
    """Of all parameters, on one device."""
    return itemsize * sum(shard_size(one, architecture, layout, gathered) for one in parameters.of(architecture))


def cache_bytes(execution: Execution, rows: int, positions: int, itemsize: int) -> int:
    """Of the cache, on one device, with what cached latents are padded by."""
    architecture, layout = execution.architecture, execution.layout
    numbers = _local_cached_numbers(architecture, layout)
    if architecture.attention.kind == "latent":
        numbers += -numbers % execution.channel_multiple
    return itemsize * _local(rows, layout) * positions * numbers * architecture.decoder.num_layers


def share(execution: Execution, load: StepShape, itemsize: int) -> Share:
    """The least work and sends of a prefill or decode step that samples one token for each row.

    Args:
        execution: the model, its mesh and its dispatch.
        load: the step.
        itemsize: bytes of a weight, of a number in the cache and of an activation.
    """
    architecture, layout = execution.architecture, execution.layout
    rows = _local(load.rows, layout)
    passed = _one_pass(execution, load, rows)
    cached = rows * (load.cached + load.new) * architecture.decoder.num_layers
    numbers = passed.read + cached * _local_cached_numbers(architecture, layout)
    sent_bytes, collectives = _sent(execution, load, itemsize, training=False)
    return Share(Work(itemsize * numbers, 2 * passed.multiplied), sent_bytes, collectives)


class Training(NamedTuple):
    """What trains, on one device, and what a step does beside one pass forward and one backward."""

    numbers: int  # that train
    all_weights: bool  # otherwise most matrices have no gradient
    teacher: bool
    remat: bool
    accumulation: int


def training_share(execution: Execution, load: StepShape, itemsize: int, training: Training) -> Share:
    """The least work and sends of a training step, whose rows are those of one of its batches.

    Every pass reads all weights that it multiplies by. Gradients are float32 in memory, moments too; they are read and
    written once. The teacher has the model's own number of experts.
    """
    layout, most = execution.layout, training.accumulation
    scored = _local(load.rows, layout) * load.new
    passed = _one_pass(execution, load, scored)
    full = load._replace(k=max(execution.architecture.k_L))
    taught = _one_pass(execution, full, scored)
    forward = 1 + training.remat
    products = (forward + 1 + training.all_weights) * passed.multiplied + training.teacher * taught.multiplied
    moved_bytes = most * itemsize * ((forward + 1) * passed.read + training.teacher * taught.read)
    moved_bytes += training.numbers * (2 * itemsize + 2 * _FLOAT32 + 4 * _FLOAT32)
    sent_bytes, collectives = _sent(execution, load, itemsize, training=True)
    for forward_only in [load] * training.remat + [full] * training.teacher:
        more = _sent(execution, forward_only, itemsize, training=False)
        sent_bytes, collectives = sent_bytes + more[0], collectives + more[1]
    if layout is not None and layout.fsdp:
        parts = execution.architecture.decoder.num_layers
        gathered = weight_bytes(execution.architecture, layout, itemsize, gathered=True)
        gathered -= weight_bytes(execution.architecture, layout, itemsize)
        times = forward + 1 + training.all_weights + training.teacher
        sent_bytes += times * gathered
        collectives += times * parts
    elif layout is not None and layout.data_parts > 1:
        sent_bytes += 2 * (1 - 1 / layout.data_parts) * training.numbers * itemsize / most
        collectives += 1
    return Share(Work(moved_bytes, 2 * most * products), most * sent_bytes, most * collectives)


class _Pass(NamedTuple):
    """One pass forward of one device: numbers of weights read, and multiplications."""

    read: float
    multiplied: float


def _one_pass(execution: Execution, load: StepShape, scored: int) -> _Pass:
    """Of the rows of a device; `scored` is for how many tokens the output projection runs."""
    architecture, layout = execution.architecture, execution.layout
    trunk, rows = architecture.decoder, _local(load.rows, layout)
    tokens, experts = rows * load.new, _experts(execution, load)
    fixed = [one for one in parameters.of(architecture) if not parameters.is_routed(one) and "V" not in one.letters]
    sizes = {one: shard_size(one, architecture, layout, gathered=True) for one in fixed}
    head = shard_size(parameters.find(["embedding_VD"]), architecture, layout, gathered=True)
    read = sum(sizes.values()) + head + experts.read
    if not trunk.tie_embeddings:
        read += min(tokens, trunk.vocab_size) * trunk.d_model
    matrices = sum(size for one, size in sizes.items() if one.kind is Matrix)
    seen = load.new * load.cached + load.new * (load.new + 1) // 2
    mixed = trunk.num_layers * rows * seen * mixed_numbers(architecture.attention, load.new) / _tensor(layout)
    return _Pass(read, tokens * matrices + mixed + experts.multiplied + scored * head)


class _Experts(NamedTuple):
    """Of the routed experts of all layers, on one device."""

    read: float  # numbers
    multiplied: float  # numbers, once for each token


def _experts(execution: Execution, load: StepShape) -> _Experts:
    architecture, layout = execution.architecture, execution.layout
    size = parameters.count_expert(architecture) / _tensor(layout)
    parts, groups = (1, 1) if layout is None else (layout.config.expert_parts, _groups(layout))
    tokens = math.ceil(load.rows / groups) * load.new
    read = slots = 0.0
    for num_experts, most in zip(architecture.num_experts_L, architecture.k_L):
        k = min(load.k, most)
        read += expected_distinct(num_experts, k, tokens) / parts
        slots += tokens * k / parts
    return _Experts(size * read, size * slots)


def _sent(execution: Execution, load: StepShape, itemsize: int, training: bool) -> tuple[float, int]:
    """Bytes and collectives of the dispatch of each MoE layer, and of the sums over `tensor`."""
    layout, trunk = execution.layout, execution.architecture.decoder
    if layout is None or layout.mesh.size == 1:
        return 0.0, 0
    row_bytes, moe, passes = trunk.d_model * itemsize, execution.architecture.moe, 1 + training
    how = execution.dispatch.of(load.rows * load.new)
    one = choose.sent(how.name, min(load.k, execution.k_max), how, training)
    sent_bytes = trunk.num_moe_layers * one.rows * row_bytes * load.rows * load.new / _groups(layout)
    collectives = trunk.num_moe_layers * one.collectives
    if (tensor := _tensor(layout)) > 1:
        sums = trunk.num_layers + trunk.num_dense_layers + 1  # attention, dense feed-forwards, embeddings
        # that of the shared experts is one with that of the routed ones, if these lie over the same devices
        sums += trunk.num_moe_layers if moe.num_shared_experts and layout.config.expert_parts > 1 else 0
        tokens = _local(load.rows, layout) * load.new
        sent_bytes += passes * sums * 2 * (tensor - 1) / tensor * tokens * row_bytes
        collectives += passes * sums
    return sent_bytes, collectives


def _local(rows: int, layout: Layout | None) -> int:
    return rows if layout is None else math.ceil(rows / layout.data_parts)


def _tensor(layout: Layout | None) -> int:
    return 1 if layout is None else layout.mesh.shape["tensor"]


def _groups(layout: Layout) -> int:
    """The sets of tokens that each have all experts to themselves."""
    return 1 if "data" in layout.expert_axes else layout.data_parts


def _local_cached_numbers(architecture: Architecture, layout: Layout | None) -> int:
    split = architecture.attention.kind == "grouped" and layout is not None and "G" not in layout.whole
    return cached_numbers(architecture.attention) // (_tensor(layout) if split else 1)
