"""Which layers a model has: the stacks that hold their weights, and the order in which they run.

Layers of equal shape share one stack, wherever they are in the model: `dense`, `moe`, and, for MoE layers with fewer
experts than the largest, one named after their number, such as `moe_48`.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.config.architecture import Architecture, MoEConfig

DENSE, MOE = "dense", "moe"


class Layer(NamedTuple):
    """One layer of a model. The numbers may be traced."""

    stack: str
    index: Any  # in its stack
    number: Any  # among all layers: its index in the cache
    column: Any  # among the MoE layers, in settings and counts; a dense layer has that of the next MoE layer

    @property
    def is_moe(self) -> bool:
        """Whether it is a MoE layer, rather than a dense one."""
        return self.stack != DENSE


class Block(NamedTuple):
    """A run of consecutive layers that repeats: each pass takes the next layers of the same stacks."""

    layers: tuple[Layer, ...]  # of the first pass
    times: int  # number of passes

    @property
    def num_moe(self) -> int:
        """MoE layers in one pass."""
        return sum(layer.is_moe for layer in self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether there are MoE layers."""
        return self.num_moe > 0

    @property
    def stacks(self) -> list[str]:
        """The stacks of its layers."""
        return list(dict.fromkeys(layer.stack for layer in self.layers))

    @property
    def places(self) -> list[int]:
        """For each layer of a pass, its index among the layers of the same stack in that pass."""
        return [layer.index - self.first(layer.stack) for layer in self.layers]

    def first(self, stack: str) -> int:
        """The index in a stack of the first layer that the block takes from it."""
        return next(layer.index for layer in self.layers if layer.stack == stack)

    def stride(self, stack: str) -> int:
        """How many layers one pass takes from a stack."""
        return sum(layer.stack == stack for layer in self.layers)

    def at(self, time: Any) -> list[Layer]:
        """The layers of pass `time`, from 0; it may be traced."""
        return [
            Layer(
                layer.stack,
                layer.index + self.stride(layer.stack) * time,
                layer.number + len(self.layers) * time,
                layer.column + self.num_moe * time,
            )
            for layer in self.layers
        ]


def kind_of(stack: str) -> str:
    """`moe` for the name of any MoE stack; any other name unchanged."""
    kind, _, experts = stack.partition("_")
    return kind if kind == MOE and experts.isdecimal() else stack


def moe_stacks(names: Sequence[str]) -> list[str]:
    """The names of MoE stacks among the given ones, such as the keys of a parameter tree."""
    return [name for name in names if kind_of(name) == MOE]


@functools.lru_cache
def stacks(architecture: Architecture) -> dict[str, Sequence[int]]:
    """The layer numbers of each stack, from 0 over the whole model; no `dense` if there are no dense layers."""
    decoder, experts_L = architecture.decoder, architecture.moe.num_experts_of_layers
    dense: Sequence[int] = decoder.dense_layers or range(decoder.num_dense_layers)
    moe: Sequence[int] = range(decoder.num_dense_layers, decoder.num_layers)
    if decoder.dense_layers:
        moe = sorted({*range(decoder.num_layers)} - {*dense})
    found = {DENSE: dense, MOE: moe} if dense else {MOE: moe}
    for experts in sorted({*experts_L}, reverse=True):
        name = MOE if experts == architecture.moe.num_experts else f"{MOE}_{experts}"
        found[name] = [number for number, own in zip(moe, experts_L, strict=True) if own == experts]
    return found


def moe_of(architecture: Architecture, stack: str) -> MoEConfig:
    """The MoE section for the layers of one stack; k is at most their number of experts."""
    moe = architecture.moe
    if not moe.num_experts_of_layers:
        return moe
    experts = int(stack.removeprefix(f"{MOE}_")) if kind_of(stack) != stack else moe.num_experts
    return dataclasses.replace(
        moe, num_experts=experts, k=min(moe.k, experts), num_experts_of_layers=(), k_of_layers=()
    )


@functools.lru_cache
def layers(architecture: Architecture) -> tuple[Layer, ...]:
    """All layers in order."""
    stack_of = {number: stack for stack, numbers in stacks(architecture).items() for number in numbers}
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for number in range(architecture.decoder.num_layers):
        stack = stack_of[number]
        found.append(Layer(stack, seen[stack], number, number - seen[DENSE]))
        seen[stack] += 1
    return tuple(found)


@functools.lru_cache
def blocks(architecture: Architecture) -> tuple[Block, ...]:
    """Splits all layers into the blocks that make the shortest compiled program.

    A block with MoE layers is a loop over its passes: the program holds one copy of each layer of a pass. A block of
    dense layers alone is unrolled. Dense layers before MoE layers make two blocks; alternating dense and MoE
    layers make one. A layer that is in no pattern is a block of one pass, so the program of a model without any pattern
    grows with its depth.
    """
    all_layers = layers(architecture)
    names = [layer.stack for layer in all_layers]
    count = len(all_layers)
    # for the layers from each one on: the layers in the program, and the length and number of passes of the first block
    best: list[tuple[int, int, int]] = [(0, 0, 0)] * (count + 1)
    for first in reversed(range(count)):
        choices = []
        for length in range(1, (count - first) // 2 + 1):
            times = 1
            while names[first : first + length] == names[first + times * length : first + (times + 1) * length]:
                times += 1
                unrolled = times if {*names[first : first + length]} == {DENSE} else 1
                choices.append((length * unrolled + best[first + times * length][0], length, times))
        choices.append((1 + best[first + 1][0], 1, 1))
        best[first] = min(choices, key=lambda choice: (choice[0], choice[1], -choice[2]))
    found, first = [], 0
    while first < count:
        _, length, times = best[first]
        found.append(Block(all_layers[first : first + length], times))
        first += length * times
    return tuple(found)
