"""Which expert lives on which device, from measured loads: busy experts twice or more often, busy ones apart.

A place holds one expert. Devices have consecutive places, as many each, so the stacks of a placement are ordinary
stacks with more experts than the router knows: `held_LE` says which of the router's experts each of theirs is.
"""

import csv
import dataclasses
import functools
import heapq
import os

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.selection import Selection


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """The expert of every place: static and hashable, a part of `Dispatch`.

    Attributes:
        held_LE: int32, the router's expert at each place of each layer; every expert is in at least one.
        devices: that share the places of a layer.
    """

    held_LE: np.ndarray
    devices: int

    def __eq__(self, other):
        same = isinstance(other, ExpertPlacement) and self.devices == other.devices
        return same and np.array_equal(self.held_LE, other.held_LE)

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.devices, self.held_LE.shape, self.held_LE.tobytes()))

    @functools.cached_property
    def copies_LE(self) -> np.ndarray:
        """Int32: the places of each of the router's experts."""
        return np.stack([np.bincount(held_E) for held_E in self.held_LE]).astype(np.int32)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Int32 [L, E, most copies]: the places of each of the router's experts; -1 after the last."""
        places = np.full((*self.copies_LE.shape, self.copies_LE.max()), -1, np.int32)
        for layer, held_E in enumerate(self.held_LE):
            for expert in range(self.copies_LE.shape[1]):
                at = np.flatnonzero(held_E == expert)
                places[layer, expert, : len(at)] = at
        return places

    def device_loads(self, load_LE: np.ndarray) -> np.ndarray:
        """The load of each device, float64 [L, devices], where copies of an expert share its load evenly."""
        places = np.take_along_axis(load_LE / self.copies_LE, self.held_LE, axis=1)
        return places.reshape(len(load_LE), self.devices, -1).sum(axis=2)

    def to_places(self, selection: Selection, layer: jax.Array) -> Selection:
        """Replaces the router's experts by places; the copies of an expert take its tokens in turn."""
        copies_NK = jnp.asarray(self.copies_LE)[layer, selection.expert_NK]
        turn_NK = jnp.arange(len(copies_NK), dtype=jnp.int32)[:, None] % copies_NK
        return selection._replace(expert_NK=jnp.asarray(self._places)[layer, selection.expert_NK, turn_NK])

    def to_experts(self, load_E: jax.Array, layer: jax.Array) -> jax.Array:
        """The load of each of the router's experts, from that of the places."""
        return jnp.zeros(self.copies_LE.shape[1], load_E.dtype).at[jnp.asarray(self.held_LE)[layer]].add(load_E)


def read_loads(path: str | os.PathLike) -> np.ndarray:
    """Reads load_LE, the slots of each expert, from `expert_load.csv` of launch/evaluate.py: those of its first policy.

    Raises:
        ValueError: there is no such file, or it is not one of these.
    """
    given = f"mesh.placement = {os.fspath(path)!r}"
    try:
        with open(path, newline="") as file:
            head, *lines = csv.reader(file)
        load_LE = np.array([list(map(int, loads)) for policy, _, *loads in lines if policy == lines[0][0]])
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise ValueError(f"{given}: expected an expert_load.csv of launch/evaluate.py ({error})") from error
    if head[:2] != ["policy", "moe_layer"] or load_LE.ndim != 2 or not load_LE.size or load_LE.min() < 0:
        raise ValueError(f"{given}: expected an expert_load.csv of launch/evaluate.py")
    return load_LE


def place(load_LE: np.ndarray, devices: int, replicas: int = 0, nodes: int = 1, groups: int = 1) -> ExpertPlacement:
    """Places the experts of every layer so that the busiest device has little more than the mean.

    Extra copies go to the expert with the largest load per copy, one after the other. Copies are then placed by falling
    load, each on the least busy device that has room and does not hold the expert yet; last, pairs are swapped between
    the busiest device and others while that helps.

    Args:
        load_LE: measured slots of each expert.
        devices: that share the experts.
        replicas: places beyond one for each expert.
        nodes: that share the devices evenly, in order. With several, experts of a group stay on one node, so that the
            tokens of a group-limited router go to few.
        groups: of the router, consecutive experts.

    Raises:
        ValueError: the places, groups or devices cannot be shared evenly.
    """
    num_experts = load_LE.shape[1]
    for what, size, by in (
        ("experts and replicas", num_experts + replicas, devices),
        ("replicas", replicas, nodes),
        ("devices", devices, nodes),
        ("groups", groups if nodes > 1 else nodes, nodes),
        ("experts", num_experts, groups),
    ):
        if size % by:
            raise ValueError(f"placement: {size} {what}: expected a multiple of {by}")
    if replicas > (most := num_experts * (devices - 1)):
        raise ValueError(f"placement: {replicas} replicas: expected at most {most}, one on each device")
    return ExpertPlacement(np.stack([_place(load_E, devices, replicas, nodes, groups) for load_E in load_LE]), devices)


def _place(load_E, devices, replicas, nodes, groups):
    """The expert at each place of one layer."""
    load_E = np.asarray(load_E, np.float64)
    if nodes == 1:
        return _balance(np.arange(len(load_E)), load_E, devices, replicas)
    members = np.arange(len(load_E)).reshape(groups, -1)
    node_devices = _balance(np.arange(groups), load_E[members].sum(axis=1), nodes, 0).reshape(nodes, -1)
    experts = members[node_devices].reshape(nodes, -1)
    parts = [_balance(own, load_E[own], devices // nodes, replicas // nodes) for own in experts]
    return np.concatenate(parts)


def _balance(expert, load, devices, replicas):
    """Spreads experts with these loads, and copies of the busiest, over devices: int32, by device."""
    copies = np.ones(len(load), int)
    for _ in range(replicas):
        per_copy = np.where(copies < devices, load / copies, -1)
        copies[per_copy.argmax()] += 1
    share, room = load / copies, (len(load) + replicas) // devices
    held = [[] for _ in range(devices)]
    queue = [(0.0, device) for device in range(devices)]
    for one in np.argsort(-share, kind="stable").repeat(copies[np.argsort(-share, kind="stable")]):
        passed = []
        while one in held[queue[0][1]]:
            passed.append(heapq.heappop(queue))
            if not queue:  # the only devices with room hold it: a second copy beside the first changes nothing
                queue, passed = passed, []
                break
        total, device = heapq.heappop(queue)
        held[device].append(int(one))
        if len(held[device]) < room:
            passed.append((total + share[one], device))
        for entry in passed:
            heapq.heappush(queue, entry)
    _swap(held, share)
    return expert[np.concatenate([np.sort(own) for own in held])].astype(np.int32)


def _swap(held, share):
    """Swaps experts between the busiest device and others, as long as the larger of the two loads falls."""
    total = np.array([share[own].sum() for own in held])
    while True:
        busy = int(total.argmax())
        best, found = total[busy] * (1 - 1e-9), None
        for other in range(len(held)):
            for i, give in enumerate(held[busy]):
                for j, take in enumerate(held[other]):
                    if give in held[other] or take in held[busy]:
                        continue
                    moved = share[give] - share[take]
                    larger = max(total[busy] - moved, total[other] + moved)
                    if larger < best:
                        best, found = larger, (other, i, j, moved)
        if found is None:
            return
        other, i, j, moved = found
        held[busy][i], held[other][j] = held[other][j], held[busy][i]
        total[busy] -= moved
        total[other] += moved
