"""What a step of a model takes on devices that are not there: on the best mesh, by the compiler and by count."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.config.mesh import MeshConfig
from moe_jax.config.schema import Config
from moe_jax.cost import parallel
from moe_jax.cost.parallel import Share, StepShape, Training
from moe_jax.engine.request import execution_of
from moe_jax.kernels import chooser
from moe_jax.kernels.grouped_matmul import api as grouped_matmul
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import counted_layout, layout_of
from moe_jax.study import meshes, topologies, whole_steps
from moe_jax.study.meshes import CountedMesh
from moe_jax.study.topologies import Topology
from moe_jax.study.whole_steps import CompiledStep, TooLargeError

DTYPE = "bfloat16"  # where model.dtype is "auto"
LANES = 128  # numbers in a row of a TPU's registers
FEWER = (6, 4, 2)  # active experts, beside the model's own


@dataclasses.dataclass(frozen=True)
class CompileTask:
    """A step of a configured model on a topology.

    Raises:
        ValueError: it has a teacher of another shape, or experts in eight bits.
    """

    config: Config
    topology: Topology

    def __post_init__(self):
        if self.trains and self.config.finetune.teacher:
            raise ValueError(
                f"finetune.teacher = {self.config.finetune.teacher!r}: expected '', since the model itself is counted "
                "as the teacher"
            )
        if self.config.model.eight_bits:
            raise ValueError(
                f"model.expert_dtype = {self.config.model.expert_dtype!r}: expected auto or model, since steps are "
                "compiled with all weights in model.dtype"
            )

    @property
    def trains(self) -> bool:
        """Whether the step is one of fine-tuning."""
        return self.config.compile.phase == "finetune"

    @property
    def dtype(self) -> str:
        """Of weights, cache and activations."""
        if self.trains:
            return self.config.training.weights
        return DTYPE if self.config.model.dtype == "auto" else self.config.model.dtype

    @property
    def rows(self) -> int:
        """Of the step that is compiled; of a training step, those of one of its batches."""
        return self.config.training.batch_size if self.trains else self.config.compile.rows

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def slots(self) -> tuple[int, ...]:
        """The numbers of active experts to count for.

        Raises:
            ValueError: one is above the model's own.
        """
        own = self.config.moe.k
        given = self.config.compile.k or (own, *(k for k in FEWER if k < own))
        if max(given) > own:
            raise ValueError(f"compile.k = {given}: expected at most the model's own {own} experts")
        return given

    @property
    def positions(self) -> int:
        """Of the cache of each row.

        Raises:
            ValueError: they are more than the model's context, or fewer than the prompt has.
        """
        settings, context = self.config.compile, self.config.decoder.max_context
        if not settings.positions <= context:
            raise ValueError(f"compile.positions = {settings.positions}: expected at most the model's {context}")
        if settings.phase == "prefill" and settings.prompt > settings.positions:
            expected = f"at most compile.positions = {settings.positions}"
            raise ValueError(f"compile.prompt = {settings.prompt}: expected {expected}")
        return settings.positions

    def step(self, rows: int, k: int) -> StepShape:
        """The step with a number of rows and of active experts."""
        settings = self.config.compile
        if self.trains:
            return StepShape(rows, self.config.training.sequence_length, 0, k)
        if settings.phase == "prefill":
            return StepShape(rows, settings.prompt, 0, k)
        return StepShape(rows, 1, self.positions - 1, k)

    def tokens(self, load: StepShape) -> int:
        """That a step reads."""
        return load.rows * load.new * (self.config.training.accumulation if self.trains else 1)

    def executed(self, mesh: MeshConfig, there: bool = True) -> Execution:
        """How the model runs on a mesh; `there`: of the topology's devices."""
        config, layout = self.config, None
        if mesh.num_devices > 1:
            on = functools.partial(layout_of, devices=self.topology.devices) if there else counted_layout
            layout = on(mesh, config.architecture)
        settings = {"kernels": config.kernels, "dtype": self.dtype, "layout": layout, "training": self.trains}
        k_max = max(config.policy.k_max, config.moe.k) if self.trains else config.policy.k_max
        return execution_of(config.architecture, k_max, platform=self.topology.platform, **settings)

    def meshes(self) -> list[CountedMesh]:
        """The configured mesh, or all that divide the model and the rows, the best first.

        Raises:
            ValueError: the configured mesh has another number of devices, or does not divide the model or the rows; or
                no mesh does.
        """
        config, count = self.config, len(self.topology.devices)
        setting = "training.batch_size" if self.trains else "compile.rows"
        if config.mesh.num_devices > 1:
            if config.mesh.num_devices != count:
                sizes = f"{config.mesh.data} x {config.mesh.expert} x {config.mesh.tensor}"
                raise ValueError(
                    f"mesh.data x expert x tensor = {sizes} = {config.mesh.num_devices} devices: expected the {count} "
                    f"of compile.topology = {self.topology.name!r}"
                )
            config.mesh.require_divides(config.architecture)
            config.mesh.require_batch(setting, self.rows)
            chosen = [config.mesh]
        else:
            found = meshes.dividing(count, config.architecture, self.rows, config.mesh, self.trains)
            chosen = [mesh for mesh in found if self.suits(mesh)]
            if not chosen:
                raise ValueError(
                    f"compile.topology = {self.topology.name!r}: no mesh of {count} devices divides the model and "
                    f"{setting} = {self.rows}: expected another number of rows or devices"
                )
        return meshes.ranked(chosen, self.counted_on, self.topology.chip)

    def least_devices(self) -> int:
        """The number of devices, in powers of two from those of the topology on, that hold weights and cache; or 0."""
        count = len(self.topology.devices)
        while count <= topologies.MOST_DEVICES:
            found = meshes.dividing(count, self.config.architecture, self.rows, MeshConfig(), self.trains)
            if any(self.counted_on(mesh).held_bytes <= self.topology.chip.memory_bytes for mesh in found):
                return count
            count *= 2
        return 0

    def suits(self, mesh: MeshConfig) -> bool:
        """Whether the kernels of the whole model run on its parts, and read weights as they lie.

        On a TPU, a matrix whose rows are no multiple of 128 numbers may lie the other way round, and would be copied.
        """
        moe, platform = self.config.moe, self.topology.platform
        hidden = moe.expert_hidden // mesh.tensor
        if platform == "tpu":
            return mesh.tensor == 1 or hidden % LANES == 0
        whole = chooser.resolve(platform, self.config.architecture, self.dtype, num_devices=mesh.num_devices)
        implementation = grouped_matmul.IMPLEMENTATIONS[whole.grouped_matmul]
        if not hasattr(implementation, "lacks"):
            return True
        part = dataclasses.replace(moe, expert_hidden=hidden, shared_hidden=moe.shared_width)
        return not implementation.lacks(dataclasses.replace(self.config.architecture, moe=part), self.dtype)

    def counted_on(self, mesh: MeshConfig) -> CountedMesh:
        """What the step takes on a mesh, by count."""
        execution, load = self.executed(mesh, there=False), self.step(self.rows, self.slots[0])
        share = self.share(execution, load)
        if self.trains:
            state, fixed = whole_steps.finetuning_state(self.config, execution, self.topology)
            gradients = 4 * whole_steps.device_numbers(state.params)
            held_bytes = whole_steps.device_bytes((state, fixed)) + gradients
        else:
            held_bytes = parallel.weight_bytes(execution.architecture, execution.layout, self.itemsize)
            held_bytes += parallel.cache_bytes(execution, self.rows, self.positions, self.itemsize)
        return CountedMesh(mesh, execution, load, held_bytes, share, share.estimate_s(self.topology.chip))

    def share(self, execution: Execution, load: StepShape) -> Share:
        """The least work of one device."""
        if not self.trains:
            return parallel.share(execution, load, self.itemsize)
        config = self.config
        state, _ = whole_steps.finetuning_state(config, execution, self.topology)
        numbers = whole_steps.device_numbers(state.params)
        all_weights, teacher = config.finetune.train == "all", config.objective.has_teacher
        what = Training(numbers, all_weights, teacher, config.training.remat, config.training.accumulation)
        return parallel.training_share(execution, load, self.itemsize, what)

    def lower(self, candidate: CountedMesh) -> whole_steps.Lowered:
        """The step, before it is compiled."""
        settings, dtype = self.config.compile, jnp.dtype(self.dtype)
        execution = self.executed(candidate.mesh)
        given = execution, self.topology, settings.rows
        if self.trains:
            return whole_steps.lower_finetuning(self.config, execution, self.topology)
        if settings.phase == "prefill":
            return whole_steps.lower_prefill(*given, settings.prompt, self.positions, dtype)
        return whole_steps.lower_decode(*given, self.positions, dtype)

    def compile(self, candidate: CountedMesh) -> CompiledStep | TooLargeError:
        """What the compiler says of the step, or why it is too large; nothing is compiled if weights alone are."""
        if candidate.held_bytes > self.topology.chip.memory_bytes:
            return TooLargeError("not compiled, since these alone are too large")
        try:
            return whole_steps.compile_step(self.lower(candidate), self.topology)
        except TooLargeError as error:
            return error


class Counted(NamedTuple):
    """A step by count, for one device."""

    load: StepShape
    share: Share


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """All that is known of a step."""

    task: CompileTask
    candidates: Sequence[CountedMesh]  # the best first, which was compiled
    compiled: CompiledStep | TooLargeError

    @property
    def best(self) -> CountedMesh:
        """The mesh that was compiled."""
        return self.candidates[0]

    @property
    def fits(self) -> bool:
        """Whether the devices have the memory."""
        chip = self.task.topology.chip
        return isinstance(self.compiled, CompiledStep) and self.compiled.needed_bytes <= chip.memory_bytes

    @functools.cached_property
    def counted(self) -> list[Counted]:
        """The step with every number of rows and active experts; a program for them all."""
        task = self.task
        rows = [task.rows] if task.trains else sorted({task.rows, *task.config.compile.batches})
        loads = [task.step(one, k) for one in rows for k in task.slots]
        return [Counted(load, task.share(self.best.execution, load)) for load in loads]
