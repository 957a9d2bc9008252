"""Times loading a checkpoint, relative to copying its tensors once; and its peak memory, relative to the weights.

    python benchmarks/loading.py --config configs/benchmark_loading.gin --out out/loading

The checkpoint has the configured shape and random weights. It is written once, to OUT/checkpoint, and kept. Its files
are in the page cache. There are two copies, both from mapped files: to memory that is in use already, and to fresh
memory, which the system zeroes first, as it does when loading. Every round times all cases in turn; figures are
medians. Memory is that of a process that only loads: pages that belong to no file.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 7
SHARD_BYTES = 1_000_000_000
PEAK = """
import json, sys, threading, time
import jax, moe_jax

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    while not loaded.wait(0.002):
        seen.append(anonymous_bytes())

jax.device_put(0)
before, seen, loaded = anonymous_bytes(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = moe_jax.load(sys.argv[1])
loaded.set()
watcher.join()
print(json.dumps({"before": before, "peak": max(seen)}))
"""


def main(run: command.Command) -> None:
    """Writes the checkpoint unless it exists, then measures."""
    import numpy as np

    import moe_jax
    from moe_jax.checkpoint import safetensors_file

    folder = run.out / "checkpoint"
    with run.timed("write"):
        write(folder, run.config)
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        mapped = np.memmap(path, np.uint8, "r")
        for stored in safetensors_file.read_table(path).values():
            tensors.append(np.asarray(mapped[stored.start : stored.start + stored.nbytes]))
    copies = [np.empty(tensor.shape, np.uint8) for tensor in tensors]
    weights_bytes = sum(copy.nbytes for copy in copies)

    def copy_all():
        for copy, tensor in zip(copies, tensors):
            np.copyto(copy, tensor)

    def copy_to_fresh():
        fresh, end = np.empty(weights_bytes, np.uint8), 0
        for tensor in tensors:
            begin, end = end, end + tensor.size
            np.copyto(fresh[begin:end], tensor)

    cases = {
        "copy": copy_all,
        "copy_to_fresh": copy_to_fresh,
        "load": lambda: moe_jax.load(folder),
    }

    def time_once(case):
        start = time.perf_counter()
        result = case()
        seconds = time.perf_counter() - start
        del result
        return seconds

    seconds = {name: [] for name in cases}
    with run.timed("run"):
        for turn in range(ROUNDS + 1):
            for name, case in cases.items():
                taken = time_once(case)
                if turn:  # the first round warms up
                    seconds[name].append(taken)
    with run.timed("memory"):
        done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], check=True, capture_output=True, cwd=ROOT)
    memory = json.loads(done.stdout)
    typical = {name: statistics.median(values) for name, values in seconds.items()}

    def over(name):
        ratios = [load / copy for load, copy in zip(seconds["load"], seconds[name])]
        return {"value": statistics.median(ratios), "unit": "1", "range": [min(ratios), max(ratios)]}

    figures = {
        "weights": {"value": weights_bytes / 1e9, "unit": "GB"},
        **{name: {"value": typical[name], "unit": "s"} for name in cases},
        "load_over_copy": over("copy"),
        "load_over_copy_to_fresh": over("copy_to_fresh"),
        "peak_over_weights": {"value": memory["peak"] / weights_bytes, "unit": "1"},
        "before_loading": {"value": memory["before"] / 1e9, "unit": "GB"},
    }
    lines = [f"{name:24} {figure['value']:8.3f} {figure['unit']}" for name, figure in figures.items()]
    run.finish(figures, text="\n".join(lines))


def write(folder: pathlib.Path, config) -> None:
    """Writes random weights in bfloat16, unless the folder already holds a model of that shape."""
    from moe_jax import checkpoint
    from moe_jax.checkpoint import huggingface
    from moe_jax.study.random_model import random_params

    if not folder.exists():
        params = random_params(config.architecture, "bfloat16", config.run.seed)
        huggingface.write_checkpoint(
            folder, config.architecture, params, dtype="auto", model_type="olmoe", shard_bytes=SHARD_BYTES
        )
    if checkpoint.open(folder).architecture != config.architecture:
        raise ValueError(f"{folder} holds a model of another shape: remove it, or give another --out")


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_loading.gin"),
        default_out="out/loading",
    )
