"""The least work of one device of a mesh in a step, what it sends, and the least time that follows.

Experts are chosen evenly and independently. What a device must read and multiply is counted as in `roofline`, of its
own part. Collectives come between operations that need each other, so their time is added.
"""

import math
from typing import NamedTuple

from moe_jax.config.architecture import Architecture
from moe_jax.cost.chips import Chip
from moe_jax.cost.roofline import Work, cached_numbers, expected_distinct, floor_s, mixed_numbers
from moe_jax.dispatch import choose
from moe_jax.model import parameters
from moe_jax.model.execution import Execution
from moe_jax.model.parameters import Matrix, Parameter
from moe_jax.model.sharding import Layout

START_S = 5e-6  # until a collective has started: assumed, as `dispatch.choose` does, and measured on no device


class Load(NamedTuple):
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

    def floor_s(self, chip: Chip) -> float:
        """The longer of moving and computing, and the time of the links."""
        return floor_s(self.work, chip.machine) + self.sent_bytes / chip.link_bytes_per_s

    def estimate_s(self, chip: Chip) -> float:
        """The floor, and the starts of the collectives."""
        return self.floor_s(chip) + START_S * self.collectives


def shard_size(parameter: Parameter, architecture: Architecture, layout: Layout | None) -> int:
    """The numbers of a parameter that one device has."""
    shape = parameter.shape(architecture)
    return math.prod(shape if layout is None else layout.of_parameter(parameter).shard_shape(shape))


def weight_bytes(architecture: Architecture, layout: Layout | None, itemsize: int) -> int:
    """Of all parameters, on one device."""
    return itemsize * sum(shard_size(one, architecture, layout) for one in parameters.of(architecture))


def cache_bytes(architecture: Architecture, layout: Layout | None, rows: int, positions: int, itemsize: int) -> int:
    """Of the cache, on one device."""
    numbers = architecture.decoder.num_layers * _local_cached_numbers(architecture, layout)
    return itemsize * _local(rows, layout) * positions * numbers


def share(execution: Execution, load: Load, itemsize: int) -> Share:
    """The least work and sends of a prefill or decode step that samples one token for each row.

    Args:
        execution: the model, its mesh and its dispatch.
        load: the step.
        itemsize: bytes of a weight, of a number in the cache and of an activation.
    """
    architecture, layout = execution.architecture, execution.layout
    trunk, rows = architecture.decoder, _local(load.rows, layout)
    tokens, experts = rows * load.new, _experts(execution, load)
    fixed = [one for one in parameters.of(architecture) if not parameters.is_routed(one) and "V" not in one.letters]
    head = shard_size(parameters.find(["embedding_VD"]), architecture, layout)
    numbers = sum(shard_size(one, architecture, layout) for one in fixed) + head + experts.read
    if not trunk.tie_embeddings:
        numbers += min(tokens, trunk.vocab_size) * trunk.d_model
    cached = rows * (load.cached + load.new) * trunk.num_layers * _local_cached_numbers(architecture, layout)
    matrices = sum(shard_size(one, architecture, layout) for one in fixed if one.kind is Matrix)
    seen = load.new * load.cached + load.new * (load.new + 1) // 2
    mixed = trunk.num_layers * rows * seen * mixed_numbers(architecture.attention, load.new) / _tensor(layout)
    products = tokens * matrices + mixed + experts.multiplied + rows * head
    sent_bytes, collectives = _sent(execution, load, tokens, itemsize)
    return Share(Work(itemsize * (numbers + cached), 2 * products), sent_bytes, collectives)


class _Experts(NamedTuple):
    """Of the routed experts of all layers, on one device."""

    read: float  # numbers
    multiplied: float  # numbers, once for each token


def _experts(execution: Execution, load: Load) -> _Experts:
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


def _sent(execution: Execution, load: Load, tokens: int, itemsize: int) -> tuple[float, int]:
    """Bytes and collectives of the dispatch of each MoE layer, and of the sums over `tensor`."""
    layout, trunk = execution.layout, execution.architecture.decoder
    if layout is None or layout.mesh.size == 1:
        return 0.0, 0
    row_bytes, moe = trunk.d_model * itemsize, execution.architecture.moe
    how = execution.dispatch.of(load.rows * load.new)
    one = choose.sent(how.name, min(load.k, execution.k_max), how)
    sent_bytes = trunk.num_moe_layers * one.rows * row_bytes * load.rows * load.new / _groups(layout)
    collectives = trunk.num_moe_layers * one.collectives
    if (tensor := _tensor(layout)) > 1:
        sums = trunk.num_layers + trunk.num_dense_layers + 1  # attention, dense feed-forwards, embeddings
        sums += trunk.num_moe_layers if moe.num_shared_experts else 0
        sent_bytes += sums * 2 * (tensor - 1) / tensor * tokens * row_bytes
        collectives += sums
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
