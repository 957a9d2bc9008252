"""Checks on a CPU what launch/compile.py reports: weights, cache and temporaries, against the memory that a run takes.

    python benchmarks/compile_checked.py --layers 16 --out out/compile_checked

OLMoE-1B-7B's published shape in bfloat16 with random weights, which needs 15 GB of free memory with all its 16 layers,
and takes two minutes on two cores. A prefill, then a decode step, each in a process of its own: it is compiled, then
weights are made, then a cache, then it runs. What each adds to the resident memory of the process, the run at its peak,
is compared with what was reported. The exit status is 1 if the sums differ by more than 10%.
"""

import argparse
import json
import multiprocessing
import pathlib
import sys

import jax
import jax.numpy as jnp

from moe_jax import files
from moe_jax.command import provenance
from moe_jax.config import gin
from moe_jax.engine import cache as caches
from moe_jax.engine import steps
from moe_jax.engine.request import execution_of
from moe_jax.study import topologies, whole_steps
from moe_jax.study.random_model import random_params

MODEL = pathlib.Path(__file__).parents[1] / "configs" / "models" / "olmoe_1b_7b.gin"
DTYPE = jnp.dtype("bfloat16")
ROWS, POSITIONS, PROMPT = 2, 1024, 512
MOST = 0.1  # relative difference


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Lets the peak of resident memory begin again."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def filled(tree):
    """Arrays of ones in the shapes of abstract arrays."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tree)


def measure(phase: str, layers: int) -> dict[str, dict[str, int]]:
    """Bytes of weights, of cache and temporaries, and of all: reported, and added to this process."""
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.find("cpu:1")
    architecture = gin.read_config(MODEL, [f"decoder.num_layers={layers}"]).architecture
    execution = execution_of(architecture, dtype=DTYPE.name)
    if phase == "decode":
        step = whole_steps.lower_decode(execution, topology, ROWS, POSITIONS, DTYPE)
    else:
        step = whole_steps.lower_prefill(execution, topology, ROWS, PROMPT, PROMPT, DTYPE)
    reported = whole_steps.compile_step(step, topology)
    program, _ = topology.compile(step.lowered)
    jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(1000)))
    before = status("VmRSS")
    params = random_params(architecture, DTYPE, 0)
    with_weights = status("VmRSS")
    live = filled(whole_steps.live_of(ROWS, execution, whole_steps.place_of(execution, topology)))
    numbers, one = jnp.ones(ROWS, jnp.int32), jnp.ones((), jnp.int32)
    if phase == "decode":
        cache = caches.allocate(execution.architecture, ROWS, POSITIONS, DTYPE)
        slots = jax.block_until_ready(steps.CacheSlots(cache, numbers, numbers + 0, numbers + 0))
        del cache
        given = params, slots, numbers > 0, one, numbers[:1], live
        del slots
    else:
        given = params, jnp.ones((ROWS, PROMPT), jnp.int32), numbers * PROMPT, numbers, numbers[:1], live
    forget_peak()
    jax.block_until_ready(program(*given))
    peak = status("VmHWM")
    reported_bytes = {
        "weights": reported.weight_bytes,
        "cache and temporaries": reported.cache_bytes + reported.temporary_bytes + reported.other_bytes,
        "sum": reported.needed_bytes,
    }
    added_bytes = {"weights": with_weights - before, "cache and temporaries": peak - with_weights, "sum": peak - before}
    return {"reported": reported_bytes, "added": added_bytes}


def main() -> None:
    """Measures both phases, and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compile_checked"))
    flags = parser.parse_args()
    found = {}
    for phase in ("prefill", "decode"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[phase] = pool.apply(measure, (phase, flags.layers))
        for name, size in found[phase]["reported"].items():
            added = found[phase]["added"][name]
            print(f"{phase:8} {name:22} reported {size / 1e9:7.3f} GB, added {added / 1e9:7.3f} GB")
    differences = {phase: one["added"]["sum"] / one["reported"]["sum"] - 1 for phase, one in found.items()}
    result = {**provenance(), "layers": flags.layers, "phases": found, "differences": differences}
    flags.out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(flags.out / "result.json", json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{phase} {difference:+.1%}" for phase, difference in differences.items()))
    sys.exit(any(abs(difference) > MOST for difference in differences.values()))


if __name__ == "__main__":
    main()
