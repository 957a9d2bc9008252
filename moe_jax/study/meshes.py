"""Which mesh of devices suits a model best: all that divide it, in the order of the least time of a step."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moe_jax.config.architecture import Architecture
from moe_jax.config.mesh import EXPERT_AXES, MeshConfig
from moe_jax.cost.chips import ChipPeaks
from moe_jax.cost.parallel import Share, StepShape
from moe_jax.model.execution import Execution


class CountedMesh(NamedTuple):
    """A mesh, and what a step takes there by count."""

    mesh: MeshConfig
    execution: Execution
    load: StepShape
    held_bytes: int  # weights and cache of one device
    share: Share
    seconds: float


def dividing(
    count: int, architecture: Architecture, rows: int, given: MeshConfig, training: bool = False
) -> Iterator[MeshConfig]:
    """The meshes of `count` devices that divide a model and the rows of a batch; other settings as given.

    In training, matrices lie over the data axis too.
    """
    for data in _divisors(count):
        for expert in _divisors(count // data):
            for axes in EXPERT_AXES if data > 1 and not training else EXPERT_AXES[:1]:
                sizes = {"data": data, "expert": expert, "tensor": count // data // expert, "expert_axes": axes}
                mesh = dataclasses.replace(given, **sizes, fsdp=data if training else 1)
                try:
                    mesh.require_divides(architecture)
                    mesh.require_batch("rows", rows)
                except ValueError:
                    continue
                yield mesh


def ranked(
    found: Sequence[MeshConfig], counted: Callable[[MeshConfig], CountedMesh], chip: ChipPeaks
) -> list[CountedMesh]:
    """The meshes in the order of their time; what does not fit in the memory of a device comes last, by its size."""

    def order(one: CountedMesh) -> tuple[int, float]:
        return (0, one.seconds) if one.held_bytes <= chip.memory_bytes else (one.held_bytes, one.seconds)

    return sorted(map(counted, found), key=order)


def _divisors(count: int) -> list[int]:
    return [one for one in range(1, count + 1) if count % one == 0]
