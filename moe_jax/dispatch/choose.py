"""Chooses how tokens reach their experts, by what a step would send: once, before anything is compiled.

Counted for one device, in rows of D numbers per token of its group, which are the tokens that share a set of experts.
They come as the rest of the model has them, spread over `data` and the same on `expert` and `tensor`, and their results
go back so. The router's choice and tables of counts are small, and left out; so is the work on a device.
"""

import dataclasses
import math
from typing import NamedTuple, Self

from moe_jax.dispatch.api import IMPLEMENTATIONS
from moe_jax.dispatch.contract import Dispatch

AUTO = "auto"
DROPPING = ("all_to_all", "ragged")  # that have a capacity
# A link could send this much while a collective starts, if that takes 5 microseconds at 200 GB/s: assumed, and measured
# on no device. A decode step sends less in all, so the number of collectives decides for it.
START_BYTES = 2**20
_COLLECTIVES = {"local": 0, "replicated": 1, "all_gather": 5, "all_to_all": 4, "ragged": 4}
_FURTHER_COLLECTIVES = 3  # of an exact `all_to_all`: whether all rows were sent, and one more exchange
_EXCHANGES = 2  # of an exact `all_to_all`: with measured loads the fullest block is nearly always beyond the capacity


class Sent(NamedTuple):
    """What one device sends for one MoE layer, in a step of inference or of training."""

    collectives: int
    rows: float  # of D numbers per token of the group


def sent(name: str, k: int, how: Dispatch, training: bool = False) -> Sent:
    """Counts what a dispatch sends with K slots per token, all kept; `how` gives the mesh, its name is not read."""
    experts, tensor = how.expert_shards, how.tensor_shards
    parts = how.mesh.shape["data"] if "data" in how.expert_axes else 1  # of a group's tokens, as they come
    everywhere = 1 - 1 / (experts * tensor)
    if name == "replicated":
        around, run = 1 - 1 / parts, 2 * everywhere
        extra = run if training else 0  # its gradient takes one sum more
    else:
        around, extra = 1 / parts - 1 / (experts * tensor), 0
        rows = held = 1.0  # that come to a device, and that it then has room for
        if name == "all_to_all":
            rows = held = (1 if how.drop else _EXCHANGES) * how.capacity * k / experts
        elif name == "ragged":
            rows, held = k / experts, how.capacity * k / experts if how.drop else k
        run = 2 * (rows * (1 - 1 / experts) / tensor + held * (1 - 1 / tensor))
    collectives = _COLLECTIVES[name] + (around > 0)
    if name == "all_to_all" and not how.drop:
        collectives += _FURTHER_COLLECTIVES
    passes = 2 if training else 1
    return Sent(passes * collectives, passes * (around + run) + extra)


@dataclasses.dataclass(frozen=True)
class DispatchByTokens:
    """The dispatch of each step of a run, by the number of its tokens.

    Attributes:
        steps: the number of tokens from which on each dispatch is used, rising from 0.
    """

    steps: tuple[tuple[int, Dispatch], ...] = ((0, Dispatch()),)

    def of(self, tokens: int) -> Dispatch:
        """The dispatch of a step with this many tokens, of all devices."""
        return [how for least, how in self.steps if least <= tokens][-1]

    @property
    def drops(self) -> bool:
        """Whether slots may be dropped."""
        return any(how.drop and how.name in DROPPING for _, how in self.steps)

    @property
    def exact(self) -> Self:
        """The same without a capacity: no slot is dropped."""
        return type(self)(tuple((least, dataclasses.replace(how, drop=False)) for least, how in self.steps))

    @property
    def name(self) -> str:
        """In words, for results."""
        (_, first), *others = self.steps
        return ", ".join([first.name, *(f"from {least} tokens {how.name}" for least, how in others)])


def choose(how: Dispatch, name: str, k: int, row_bytes: int, platform: str, training: bool = False) -> DispatchByTokens:
    """The dispatches that send the fewest bytes, a collective's start counted as `START_BYTES`.

    `ragged` is a candidate on TPUs alone. On GPUs others have measured a few percent of a link's rate for it
    (openxla/xla issue 33386), and for CPUs XLA does not have it.

    Args:
        how: the mesh and the capacity; its name is replaced.
        name: "auto", or of the dispatch of all steps.
        k: slots per token.
        row_bytes: of the D numbers of a token.
        platform: "cpu", "gpu" or "tpu".
        training: whether steps have a gradient.

    Raises:
        ValueError: the name is unknown, or cannot run on this mesh or with this capacity.
    """
    if name != AUTO:
        _require(how, name)
        return DispatchByTokens(((0, dataclasses.replace(how, name=name)),))
    names = ["local", "replicated"]
    if how.expert_shards > 1:
        names = ["replicated", "all_gather", "all_to_all"]
        names += ["ragged"] if platform == "tpu" else []
    counted = {name: sent(name, k, how, training) for name in names}
    groups = math.prod(how.mesh.shape[axis] for axis in how.other_axes)
    lines = {name: (START_BYTES * one.collectives, row_bytes * one.rows / groups) for name, one in counted.items()}
    return DispatchByTokens(tuple((least, dataclasses.replace(how, name=name)) for least, name in _cheapest(lines)))


def _require(how: Dispatch, name: str) -> None:
    given = f"mesh.dispatch = {name!r}"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{given}: expected {AUTO} or one of {', '.join(IMPLEMENTATIONS)}")
    if name == "local" and how.expert_shards > 1:
        raise ValueError(f"{given}: expected all experts on each device, got {how.expert_shards} parts of them")
    if how.drop and name not in DROPPING:
        raise ValueError(f"{given} has no capacity: expected mesh.capacity = 0, or one of {', '.join(DROPPING)}")


def _cheapest(lines: dict[str, tuple[float, float]]) -> list[tuple[int, str]]:
    """The cheapest of straight lines (at 0, per token), and from which number of tokens on each of them is."""
    best = min(lines, key=lines.get)
    found = [(0, best)]
    while True:
        at_zero, slope = lines[best]
        meets = {
            name: ((other - at_zero) / (slope - other_slope), other_slope)
            for name, (other, other_slope) in lines.items()
            if other_slope < slope
        }
        if not meets:
            return found
        best = min(meets, key=meets.get)
        found.append((math.ceil(meets[best][0]), best))
