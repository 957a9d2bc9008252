"""Which layers a model has: the stacks that hold their weights, and the order in which they run.

Weights of layers that are alike lie in one stack, whatever stands between them: `dense`, `moe`, and for MoE layers with
fewer experts than most, `moe_48` where they have 48.
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
    number: Any  # among all layers: its place in the cache
    column: Any  # among the MoE layers: of settings and of what is counted; of a dense layer, that of the next one

    @property
    def is_moe(self) -> bool:
        """Whether its feed-forward is a MoE layer."""
        return self.stack != DENSE


class Block(NamedTuple):
    """Layers that run one after another, and then again with the next of each stack, some number of times."""

    layers: tuple[Layer, ...]  # of the first pass
    times: int

    @property
    def num_moe(self) -> int:
        """MoE layers of one pass."""
        return sum(layer.is_moe for layer in self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether there is any."""
        return self.num_moe > 0

    @property
    def stacks(self) -> list[str]:
        """Those that its layers are in."""
        return list(dict.fromkeys(layer.stack for layer in self.layers))

    @property
    def places(self) -> list[int]:
        """Of each layer of a pass, where it is among those of its stack in the same pass."""
        return [layer.index - self.first(layer.stack) for layer in self.layers]

    def first(self, stack: str) -> int:
        """The index of the first layer that it takes of a stack."""
        return next(layer.index for layer in self.layers if layer.stack == stack)

    def stride(self, stack: str) -> int:
        """How many layers of a stack one pass takes."""
        return sum(layer.stack == stack for layer in self.layers)

    def at(self, time: Any) -> list[Layer]:
        """The layers of one pass, the first being number 0; `time` may be traced."""
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
    """`dense` or `moe`; any other name is returned as it is."""
    kind, _, experts = stack.partition("_")
    return kind if kind == MOE and experts.isdecimal() else stack


def moe_stacks(names: Sequence[str]) -> list[str]:
    """The stacks of MoE layers among names, such as those of a tree of parameters."""
    return [name for name in names if kind_of(name) == MOE]


@functools.lru_cache
def stacks(architecture: Architecture) -> dict[str, Sequence[int]]:
    """The numbers of the layers of each stack, from 0 over the whole model; `dense` only where there are any."""
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
    """The section of the configuration as the layers of one stack have it, k being at most their number of experts."""
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
    """All layers as few blocks: those that make the shortest program, which has a copy of every layer of a pass.

    A block without a MoE layer is written out, others are loops. Dense layers before MoE layers are two blocks; where
    every second layer is dense, one block has both. A layer that repeats nothing is a block that runs once: the program
    of a model without any pattern is as long as the model is deep.
    """
    every = layers(architecture)
    names = [layer.stack for layer in every]
    ends = len(every)
    # from each layer on: how many layers of passes the rest takes, and the pass and the times that it begins with
    best: list[tuple[int, int, int]] = [(0, 0, 0)] * (ends + 1)
    for first in reversed(range(ends)):
        choices = []
        for length in range(1, (ends - first) // 2 + 1):
            times = 1
            while names[first : first + length] == names[first + times * length : first + (times + 1) * length]:
                times += 1
                unrolled = times if {*names[first : first + length]} == {DENSE} else 1
                choices.append((length * unrolled + best[first + times * length][0], length, times))
        choices.append((1 + best[first + 1][0], 1, 1))
        best[first] = min(choices, key=lambda choice: (choice[0], choice[1], -choice[2]))
    found, first = [], 0
    while first < ends:
        _, length, times = best[first]
        found.append(Block(every[first : first + length], times))
        first += length * times
    return tuple(found)
