"""The mesh of devices that a model runs on: the sizes of its axes, and which models and batches they divide."""

import dataclasses
import math

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture
from moe_jax.config.checks import require, require_positive

AXES = ("data", "expert", "tensor")
EXPERT_AXES = (("expert",), ("data", "expert"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The axes of the mesh; `model/sharding.py` says what each splits. The default is one device."""

    data: int = 1  # parts of a batch
    expert: int = 1  # parts of the routed experts
    tensor: int = 1  # parts of heads, hidden widths and the vocabulary
    fsdp: int = 1  # 1, or mesh.data: matrices are split over the data axis too, and gathered layer by layer
    expert_axes: tuple[str, ...] = ("expert",)  # the axes that split the routed experts: "expert", or "data" and it
    dispatch: str = "auto"  # how tokens reach their experts, a name of `dispatch/api.py`; "auto": by what is sent
    placement: str = ""  # expert_load.csv of launch/evaluate.py, by which experts are spread; not in training
    replicas: int = 0  # with it: places beyond one for each expert, for copies of the busiest
    capacity: float = 0.0  # slots beyond this multiple of a device's even share are dropped and counted; 0: none are

    def __post_init__(self):
        require_positive("mesh", self, *AXES)
        require(self.fsdp in (1, self.data), "mesh.fsdp", self.fsdp, f"1, or mesh.data = {self.data}")
        require(0 <= self.capacity < math.inf, "mesh.capacity", self.capacity, "0 (nothing is dropped) or more")
        if self.num_devices == 1:
            require(self.dispatch in ("auto", "local"), "mesh.dispatch", self.dispatch, "auto or local on one device")
        if self.expert_parts == 1:
            require(not self.capacity, "mesh.capacity", self.capacity, "0, as all devices have all experts")
            require(not self.placement, "mesh.placement", self.placement, "none, as all devices have all experts")
        require(
            self.replicas == 0 or (self.placement and self.replicas > 0 and self.replicas % self.expert_parts == 0),
            "mesh.replicas",
            self.replicas,
            f"0, or with mesh.placement a multiple of the {self.expert_parts} parts of the experts",
        )
        given = self.expert_axes
        require(given in EXPERT_AXES, "mesh.expert_axes", given, '("expert",) or ("data", "expert")')
        both = self.fsdp > 1 and "data" in given
        require(not both, "mesh.expert_axes", given, f'("expert",), since mesh.fsdp = {self.fsdp} uses the data axis')

    @property
    def num_devices(self) -> int:
        """The number of devices."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def expert_parts(self) -> int:
        """The number of parts of the routed experts."""
        return math.prod(getattr(self, axis) for axis in self.expert_axes)

    def require_divides(self, architecture: Architecture) -> None:
        """Checks that the mesh divides a model.

        Key and value heads may be fewer than `tensor`: every device then has all of them.

        Raises:
            ValueError: an axis does not divide what it splits.
        """
        trunk, attention, tensor = architecture.decoder, architecture.attention, self.tensor
        for stack in layer_order.moe_stacks(layer_order.stacks(architecture)):
            moe = layer_order.moe_of(architecture, stack)
            name = " times ".join(f"mesh.{axis}" for axis in self.expert_axes)
            require_divisor(name, self.expert_parts, moe.num_experts, "experts of a layer")
            require_divisor("mesh.tensor", tensor, moe.expert_hidden, "hidden channels of an expert")
            require_divisor("mesh.tensor", tensor, moe.shared_width, "hidden channels of the shared experts")
        require_divisor("mesh.tensor", tensor, attention.num_heads, "query heads")
        if attention.kind == "grouped" and attention.num_kv_heads > tensor:
            require_divisor("mesh.tensor", tensor, attention.num_kv_heads, "key and value heads")
        if layer_order.DENSE in layer_order.stacks(architecture):
            require_divisor("mesh.tensor", tensor, trunk.dense_hidden, "hidden channels of a dense layer")
        require_divisor("mesh.tensor", tensor, trunk.vocab_size, "tokens of the vocabulary")
        require_divisor("mesh.fsdp", self.fsdp, trunk.d_model, "channels of the model")

    def require_trainable(self) -> None:
        """Raises ValueError if the copies of an expert would each be trained."""
        require(not self.placement, "mesh.placement", self.placement, "none in training, which changes the experts")

    def require_batch(self, setting: str, rows: int) -> None:
        """Raises ValueError if the data axis does not divide the rows of a batch, which `setting` gives."""
        require(rows % self.data == 0, setting, rows, f"a multiple of mesh.data = {self.data}")

    def require_devices(self, available: int, processes: int = 1) -> None:
        """Raises ValueError if the mesh needs more devices than there are; several processes must use all of them."""
        if self.num_devices > available or (processes > 1 and self.num_devices != available):
            expected = f"at most {available}; on a CPU, JAX_NUM_CPU_DEVICES=8 makes 8"
            if processes > 1:
                expected = f"all {available} of the {processes} processes"
            sizes = f"{self.data} x {self.expert} x {self.tensor}"
            raise ValueError(f"mesh.data x expert x tensor = {sizes} = {self.num_devices} devices: expected {expected}")


def require_divisor(setting: str, parts: int, count: int, things: str) -> None:
    """Refuses a number of parts that does not divide a count."""
    require(count % parts == 0, setting, parts, f"a divisor of the model's {count} {things}")
