"""What a dispatch takes and gives, and the mesh that it runs on."""

import dataclasses
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.config.mesh import AXES
from moe_jax.dispatch.placement import ExpertPlacement
from moe_jax.kernels.quantized import Quantized


class Experts(NamedTuple):
    """The routed experts of one layer, within the stacks of all layers: they are not copied out of them."""

    gate_up_LEIFD: jax.Array | Quantized
    down_LEDF: jax.Array | Quantized
    layer: jax.Array  # int32 scalar, the index L


class Counts(NamedTuple):
    """What a dispatch counted, over all devices."""

    load_E: jax.Array  # int32: the kept slots of each expert, overflow included
    overflow: jax.Array  # int32 scalar: kept slots that were not computed; 0 unless `Dispatch.drop`
    sent: jax.Array  # int32 scalar: rows that left their device for an expert, padding included; as many came back


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How tokens reach their experts: the static half of a dispatch.

    Attributes:
        name: of the implementation, one of `api.IMPLEMENTATIONS`.
        mesh: has the axes of `config.mesh.AXES`, of any size, and may have others; None: one device.
        expert_axes: the axes over which experts lie, in the order of the mesh: "expert", or also "data".
        capacity: for `all_to_all`, the rows that a device can send to another in one exchange, and for `ragged` with
            `drop`, those that it can receive: as a multiple of the even share with no slot dropped.
        drop: whether slots beyond the capacity are not computed; they are counted. Otherwise `all_to_all` goes on with
            further exchanges until all rows are sent, and `ragged` has room for the worst case.
        placement: which of the router's experts each one of the stacks is, if they were placed by their loads. It is
            applied around `api.dispatch`, which sees places.

    Raises:
        ValueError: the mesh lacks an axis, experts lie over an axis that cannot hold them, or the capacity is not
            positive.
    """

    name: str = "local"
    mesh: Mesh | None = None
    expert_axes: tuple[str, ...] = ("expert",)
    capacity: float = 1.25
    drop: bool = False
    placement: ExpertPlacement | None = None

    def __post_init__(self):
        if not (self.capacity > 0 and math.isfinite(self.capacity)):
            raise ValueError(f"dispatch capacity = {self.capacity}: expected a positive number")
        if self.mesh is None:
            return
        if missing := [axis for axis in AXES if axis not in self.mesh.axis_names]:
            raise ValueError(f"mesh with axes {self.mesh.axis_names}: expected also {', '.join(missing)}, of size 1")
        known = tuple(axis for axis in self.mesh.axis_names if axis in ("data", "expert"))
        if self.expert_axes not in (("expert",), known):
            raise ValueError(f"experts over {self.expert_axes}: expected ('expert',) or {known}, the mesh's order")

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes over which tokens are spread where each device has its own."""
        return tuple(axis for axis in self.mesh.axis_names if axis in ("data", "expert"))

    @property
    def other_axes(self) -> tuple[str, ...]:
        """The axes of tokens over which experts do not lie: each index of them has all experts."""
        return tuple(axis for axis in self.row_axes if axis not in self.expert_axes)

    @property
    def expert_shards(self) -> int:
        """The number of devices that share the experts; 1 without a mesh."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.expert_axes)

    @property
    def tensor_shards(self) -> int:
        """The number of devices that share the hidden width of an expert."""
        return self.mesh.shape["tensor"]

    @property
    def experts_specs(self) -> Experts:
        """The layout of the stacks: E over the expert axes, F over `tensor`."""
        return Experts(P(None, self.expert_axes, None, "tensor", None), P(None, self.expert_axes, None, "tensor"), P())

    def specs_of(self, experts: Experts) -> Experts:
        """`experts_specs`, and for weights in eight bits the layout of their scales."""
        return Experts(*map(_with_scale, self.experts_specs, experts))


def _with_scale(spec: P, weight: jax.Array | Quantized) -> P | Quantized:
    return Quantized(spec, scale_spec(spec, weight.scale.shape)) if isinstance(weight, Quantized) else spec


def scale_spec(spec: P, shape: tuple[int, ...]) -> P:
    """The layout of scales: that of their weights, but a block that spans an axis is on all of its devices."""
    return P(*(None if size == 1 else axes for size, axes in zip(shape, spec)))
