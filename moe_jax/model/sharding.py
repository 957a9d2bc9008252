"""Where parameters and activations lie on a mesh of devices: one table, from the letters of dimensions to axes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config.architecture import Architecture
from moe_jax.config.mesh import AXES, MeshConfig
from moe_jax.dispatch.contract import scale_spec
from moe_jax.dispatch.placement import ExpertPlacement, place, read_loads
from moe_jax.model import parameters
from moe_jax.model.parameters import Parameter

# Letters that are not here are whole on every device. "D" is split in training alone, see `MeshConfig.fsdp`.
AXIS_OF = {
    "B": "data",
    "N": "data",
    "E": "expert",
    "F": "tensor",
    "H": "tensor",
    "G": "tensor",
    "V": "tensor",
}

_AXIS_TYPES = (AxisType.Auto,) * len(AXES)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh: static and hashable, a part of `Execution`. `layout_of` makes one.

    Routers are whole on every device: policies look at all experts, and at all rows of a batch. Key and value heads
    are whole on every device if there are fewer than the `tensor` axis has parts, as those of a latent cache are.

    Attributes:
        mesh: has the axes `data`, `expert` and `tensor`.
        expert_axes: the axes that split the routed experts.
        whole: letters of `AXIS_OF` that this model does not split.
        fsdp: whether matrices are split over the data axis too, along D.
        dispatch: how tokens reach their experts, as `MeshConfig.dispatch`.
        capacity: as `MeshConfig.capacity`.
        placement: of the experts by their loads; None: each once, in order.
    """

    mesh: Mesh
    expert_axes: tuple[str, ...] = ("expert",)
    whole: str = ""
    fsdp: bool = False
    dispatch: str = "auto"
    capacity: float = 0.0
    placement: ExpertPlacement | None = None

    @property
    def data_parts(self) -> int:
        """The number of parts of a batch."""
        return self.mesh.shape["data"]

    @property
    def config(self) -> MeshConfig:
        """The settings that make this mesh."""
        sizes = dict(self.mesh.shape)
        return MeshConfig(**sizes, fsdp=sizes["data"] if self.fsdp else 1, expert_axes=self.expert_axes)

    def of_letters(self, letters: str) -> NamedSharding:
        """The sharding of an array with these dimensions."""
        return NamedSharding(self.mesh, PartitionSpec(*map(self._axes, letters)))

    def _axes(self, letter: str) -> str | tuple[str, ...] | None:
        if letter == "E":
            return self.expert_axes
        return None if letter in self.whole else AXIS_OF.get(letter)

    def of_parameter(self, parameter: Parameter, gathered: bool = False) -> NamedSharding:
        """The sharding of a parameter; `gathered`: while its layer runs, whole along D."""
        return self._of(parameter, parameter.letters, gathered)

    def of_leaf(self, path: Sequence[Any], leaf: Any, gathered: bool = False) -> NamedSharding:
        """The sharding of a leaf of parameters or training state, by its path in the tree.

        A moment lies as its parameter does, and a LoRA factor as the dimensions that it shares with its matrix;
        anything else is whole on every device.
        """
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        try:
            parameter = parameters.find(names)
        except KeyError:
            return self.replicated
        letters = parameter.letters
        if names[-1] in ("down", "up"):  # a factor; its rank has no letter
            first, last = parameter.num_stacked, len(letters) - len(parameter.inputs)
            letters = f"{letters[:first]}.{letters[last:]}" if names[-1] == "down" else f"{letters[:last]}."
        if len(letters) != leaf.ndim:
            return self.replicated
        sharding = self._of(parameter, letters, gathered)
        return NamedSharding(self.mesh, scale_spec(sharding.spec, leaf.shape))  # a leaf may be scales

    def _of(self, parameter: Parameter, letters: str, gathered: bool) -> NamedSharding:
        if "router" in parameter.modules:
            return self.replicated
        axes = list(map(self._axes, letters))
        if self.fsdp and not gathered and parameter.kind is parameters.Matrix and "D" in letters:
            axes[letters.index("D")] = "data"
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())


def layout_of(
    given: MeshConfig | Mesh | None, architecture: Architecture, devices: Sequence[jax.Device] = ()
) -> Layout | None:
    """The layout of a model on a mesh; None for a single device.

    Args:
        given: settings, for which a mesh of this process' devices is made (of all devices, if there are several
            processes), or a mesh whose axes are among `data`, `expert` and `tensor`; None: one device.
        architecture: of the model.
        devices: of which settings make a mesh, instead of this process' own.

    Raises:
        ValueError: the mesh does not divide the model, has an unknown axis, or needs more devices than there are.
    """
    if given is None:
        return None
    if isinstance(given, Mesh):
        if unknown := [name for name in given.axis_names if name not in AXES]:
            raise ValueError(f"mesh has the axis {unknown[0]!r}: expected axes among {', '.join(AXES)}")
        settings, devices = MeshConfig(**given.shape), given.devices.flatten()
        order = [given.axis_names.index(name) for name in AXES if name in given.axis_names]
        devices = given.devices.transpose(order).flatten()
    else:
        if not devices:
            given.require_devices(jax.device_count(), jax.process_count())
        settings, devices = given, np.array((devices or jax.devices())[: given.num_devices])
    settings.require_divides(architecture)
    if settings.num_devices == 1 and not isinstance(given, Mesh):
        return None
    sizes = tuple(getattr(settings, name) for name in AXES)
    return _on(Mesh(devices.reshape(sizes), AXES, axis_types=_AXIS_TYPES), settings, architecture)


def counted_layout(settings: MeshConfig, architecture: Architecture) -> Layout:
    """The layout on devices that need not exist, to count by; errors are those of `layout_of`."""
    settings.require_divides(architecture)
    sizes = tuple(getattr(settings, name) for name in AXES)
    return _on(AbstractMesh(sizes, AXES, axis_types=_AXIS_TYPES), settings, architecture)


def _on(mesh: Mesh | AbstractMesh, settings: MeshConfig, architecture: Architecture) -> Layout:
    attention = architecture.attention
    splits_heads = attention.kind == "grouped" and attention.num_kv_heads % settings.tensor == 0
    return Layout(
        mesh,
        settings.expert_axes,
        "" if splits_heads else "G",
        settings.fsdp > 1,
        settings.dispatch,
        settings.capacity,
        _placement(settings, architecture) if settings.placement else None,
    )


def _placement(settings: MeshConfig, architecture: Architecture) -> ExpertPlacement:
    load_LE = read_loads(settings.placement)
    expected = (architecture.decoder.num_moe_layers, architecture.moe.num_experts)
    if architecture.moe.num_experts_of_layers:
        raise ValueError(f"mesh.placement = {settings.placement!r}: expected as many experts in every layer")
    if load_LE.shape != expected:
        layers = " layers of ".join(map(str, load_LE.shape))
        raise ValueError(
            f"mesh.placement = {settings.placement!r} has {layers} experts: expected the model's "
            f"{expected[0]} layers of {expected[1]}"
        )
    return place(load_LE, settings.expert_parts, settings.replicas)


def sharding_of(layout: Layout | None) -> Callable[[Parameter], NamedSharding | None]:
    """The sharding of each parameter, as `Checkpoint.load` takes it."""
    return lambda parameter: None if layout is None else layout.of_parameter(parameter)


def constrained(x: jax.Array, letters: str, layout: Layout | None) -> jax.Array:
    """The array, split by its letters, in a compiled function; unchanged without a layout."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.of_letters(letters))


def whole(tree: Any, layout: Layout | None) -> Any:
    """Arrays, whole on every device, in a compiled function, so that every process can read them."""
    return tree if layout is None else jax.lax.with_sharding_constraint(tree, layout.replicated)


def gathered(weights: Any, modules: tuple[str, ...], layout: Layout | None) -> Any:
    """The weights of a layer, whole along D, in a compiled function; unchanged unless D is split, see `Layout.fsdp`."""
    if layout is None or not layout.fsdp:
        return weights

    def gather(path, leaf):
        at = (*map(jax.tree_util.DictKey, modules), *path)
        return jax.lax.with_sharding_constraint(leaf, layout.of_leaf(at, leaf, gathered=True))

    return jax.tree_util.tree_map_with_path(gather, weights)


def of_tree(tree: Any, layout: Layout) -> Any:
    """The sharding of every leaf of training state, or of its shapes."""
    return jax.tree_util.tree_map_with_path(layout.of_leaf, tree)


def placed(tree: Any, layout: Layout | None) -> Any:
    """Parameters or training state on their devices; unchanged without a layout."""
    return tree if layout is None else jax.jit(lambda state: state, out_shardings=of_tree(tree, layout))(tree)


def _is_here(array: jax.Array | np.ndarray) -> bool:
    """Whether this process has the whole array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """A whole array in host memory; all processes must call this if the array lies on devices of several."""
    return np.asarray(array) if _is_here(array) else multihost_utils.process_allgather(array, tiled=True)


def layer_on_host(array: jax.Array | np.ndarray, layer: int) -> np.ndarray:
    """One layer of a stacked array in host memory; of several processes all must call this, and gather that layer."""
    return np.asarray(array)[layer] if _is_here(array) else np.asarray(_layer(array.sharding.mesh)(array, layer))


@functools.cache
def _layer(mesh: Mesh) -> Callable[[jax.Array, int], jax.Array]:
    take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.jit(take, out_shardings=NamedSharding(mesh, PartitionSpec()))


def pieces_on_host(array: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """An array in host memory, in pieces that follow each other; all processes must take them together.

    A stack of matrices on devices of several processes comes layer by layer, unless its first dimension is split, so
    that no host or device holds all of it.
    """
    if _is_here(array) or array.ndim <= 2 or array.sharding.shard_shape(array.shape)[0] < len(array):
        yield on_host(array)
    else:
        yield from (layer_on_host(array, layer) for layer in range(len(array)))


def wait_for_all(what: str) -> None:
    """Waits until all processes have come here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def holds_in_all(condition: bool) -> bool:
    """Whether a condition holds in every process; all of them must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def on_all(tree: Any, layout: Layout | None) -> Any:
    """Values of the host, the same in every process, as arrays that are whole on every device of the layout, if any."""
    if layout is None:
        return tree

    def put(value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, layout.replicated, lambda index: value[index])

    return jax.tree.map(put, tree)
