"""Which mesh of devices suits a model best: all that divide it, in the order of the least time of a step."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moe_jax.config.architecture import Architecture
from moe_jax.config.mesh import EXPERT_AXES, MeshConfig
from moe_jax.cost import parallel
from moe_jax.cost.chips import Chip
from moe_jax.cost.parallel import Load, Share
from moe_jax.model.execution import Execution


class Candidate(NamedTuple):
    """A mesh, and what a step takes there by count."""

    mesh: MeshConfig
    execution: Execution
    load: Load
    held_bytes: int  # weights and cache of one device
    share: Share
    seconds: float


def dividing(count: int, architecture: Architecture, rows: int, given: MeshConfig) -> Iterator[MeshConfig]:
    """The meshes of `count` devices that divide a model and the rows of a batch; other settings as given."""
    for data in _divisors(count):
        for expert in _divisors(count // data):
            for axes in EXPERT_AXES if data > 1 else EXPERT_AXES[:1]:
                sizes = {"data": data, "expert": expert, "tensor": count // data // expert, "expert_axes": axes}
                mesh = dataclasses.replace(given, **sizes)
                try:
                    mesh.require_divides(architecture)
                    mesh.require_batch("rows", rows)
                except ValueError:
                    continue
                yield mesh


def ranked(
    candidates: Sequence[MeshConfig],
    executed: Callable[[MeshConfig], Execution],
    load: Load,
    positions: int,
    itemsize: int,
    chip: Chip,
) -> list[Candidate]:
    """The meshes in the order of their time; those whose weights and cache do not fit come last, the fullest at the end.

    Args:
        candidates: the meshes.
        executed: how the model runs on a mesh.
        load: the step.
        positions: of the cache of each row.
        itemsize: bytes of a number.
        chip: of which the devices are.
    """
    found = []
    for mesh in candidates:
        execution = executed(mesh)
        held = (execution.architecture, execution.layout)
        held_bytes = parallel.weight_bytes(*held, itemsize)
        held_bytes += parallel.cache_bytes(*held, load.rows, positions, itemsize)
        share = parallel.share(execution, load, itemsize)
        found.append(Candidate(mesh, execution, load, held_bytes, share, share.estimate_s(chip)))

    def order(one: Candidate) -> tuple[int, float]:
        return (0, one.seconds) if one.held_bytes <= chip.memory_bytes else (one.held_bytes, one.seconds)

    return sorted(found, key=order)


def _divisors(count: int) -> list[int]:
    return [one for one in range(1, count + 1) if count % one == 0]
