"""Reads from a compiled program what its devices send each other."""

import math
import re
from typing import NamedTuple

SHARE_SENT = {  # of the larger of operand and result, by each of n devices: the least with links between neighbours
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_CALL = re.compile(r"= (?P<result>.+?) (?P<name>[a-z-]+?)(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]")
# the ways in which XLA writes the devices of a group: {{0,1},{2,3}}, [2,4]<=[8], mesh['data'=2,'expert'=4] {'expert'},
# mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, mesh['data'=2,'tensor'=8] {'tensor':(1)2}
_LISTED, _COUNTED = re.compile(r"replica_groups=\{\{([\d,]*)\}"), re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computation|\w*computations)=(%[\w.-]+|\{[^}]*\})")
_LOOP = re.compile(r" while\(.*condition=%(?P<condition>[\w.-]+), body=%(?P<body>[\w.-]+)")
_KNOWN, _LIMIT = re.compile(r'"known_trip_count":\{"n":"(\d+)"'), re.compile(r"= s32\[\]\S* constant\((\d+)\)")


class Collective(NamedTuple):
    """One operation between devices, in the program of each."""

    name: str
    devices: int  # that take part in one group
    array_bytes: int  # the larger of operand and result, of one device
    times: int = 1  # that the program runs it

    @property
    def sent_bytes(self) -> float:
        """By one device, each time."""
        return self.array_bytes * SHARE_SENT[self.name](self.devices)


def collectives(program: str) -> list[Collective]:
    """The collectives with more than one device.

    Each is listed once. A loop whose number of passes the program states, as one over layers, runs it as many times;
    any other loop counts as one pass, and of a condition every branch is counted.

    Args:
        program: the text of a compiled program, `compiled.as_text()`.

    Raises:
        ValueError: the groups of devices are written in a form that is not known.
    """
    computations, entry = _computations(program)
    times = _times(computations, entry)
    found = []
    for name, lines in computations.items():
        for line in lines:
            call = _CALL.search(line)
            if call is None or call["name"] not in SHARE_SENT:
                continue
            devices = _devices(line)
            if devices > 1:
                size = _larger(call["name"], _bytes(call["result"]), devices, bool(call["start"]))
                found.append(Collective(call["name"], devices, size, times.get(name, 1)))
    return found


def _larger(name: str, stated: int, devices: int, started: bool) -> int:
    """The bytes of the larger of operand and result; the start of an operation states both, that of a sum one."""
    if started and name in ("all-gather", "reduce-scatter"):
        return stated * devices // (devices + 1)
    if started and name in ("collective-permute", "all-to-all"):
        return stated // 2
    return stated * devices if name == "reduce-scatter" else stated


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, in the order of the text, and the name of the one that runs first."""
    computations: dict[str, list[str]] = {"": []}
    entry = name = ""
    for line in program.splitlines():
        if begun := _COMPUTATION.match(line):
            name = begun["name"]
            computations[name] = []
            entry = name if begun["entry"] else entry
        else:
            computations[name].append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs that the first one calls, directly or not."""
    times = dict.fromkeys(computations, 0)

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in computations[name]:
            loop = _LOOP.search(line)
            passes = _passes(line, computations[loop["condition"]]) if loop else 1
            for called in _CALLED.findall(line):
                for other in re.findall(r"[\w.-]+", called):
                    if other in computations:
                        run(other, count * passes)

    run(entry, 1)
    return times


def _passes(line: str, condition: list[str]) -> int:
    """The passes of a loop; 1 if they depend on data."""
    if known := _KNOWN.search(line):
        return int(known[1])
    limits = [limit[1] for one in condition if (limit := _LIMIT.search(one))]
    counts = any("direction=LT" in one for one in condition)
    return int(limits[0]) if counts and len(limits) == 1 else 1


def _devices(line: str) -> int:
    """The devices of a group."""
    if "source_target_pairs=" in line:
        return 2
    if listed := _LISTED.search(line):
        return len(listed[1].split(","))
    if counted := _COUNTED.search(line):
        return int(counted[1])
    if named := _NAMED.search(line):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        axes = (axis.partition(":") for axis in named[2].split(","))
        # 'tensor':(2)4 is a part of an axis: four neighbours of each of two groups
        return math.prod(int(part.rpartition(")")[2] or sizes[axis]) for axis, _, part in axes)
    raise ValueError(f"{line.strip()[:200]}: expected replica_groups in a form that is known")


def _bytes(shapes: str) -> int:
    """Of all arrays in the text of a shape; a tuple holds several."""
    arrays = [(dtype, sizes.split(",") if sizes else []) for dtype, sizes in _ARRAY.findall(shapes)]
    return sum(math.prod(map(int, sizes)) * _itemsize(dtype) for dtype, sizes in arrays)


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) // 8
