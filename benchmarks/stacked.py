"""Times loading a model from a stacked folder and from a published one, neither in memory, and compares logits.

    python benchmarks/stacked.py --config configs/benchmark_stacked.gin --out out/stacked

The model has the configured shape and random weights. It is written once, to OUT/published, converted to OUT/stacked,
and both are kept. Each is loaded by its own process, after the system was told to drop the pages of its files; `cached`
is the share of pages that it kept nevertheless. Memory counts pages that belong to no file, above what the process held
before. `compile_and_first` and `second` are the times of logits of 128 tokens; the first includes compiling and, for
mapped weights, reading them from the disk.
"""

import ctypes
import json
import mmap
import os
import pathlib
import subprocess
import sys

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = 128
LOAD = """
import hashlib, json, pathlib, sys, threading, time
import jax, numpy as np
from moe_jax import api, command

def status_bytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

def watch():
    while not done.wait(0.005):
        seen.append(status_bytes("RssAnon"))

command.configure_jax()
jax.device_put(0)
before, seen, done, seconds = status_bytes("RssAnon"), [], threading.Event(), {}
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
model = api.load(sys.argv[1])
seconds["load"] = time.perf_counter() - start
loaded = max([*seen, status_bytes("RssAnon")])
tokens_BT = np.random.default_rng(0).integers(0, model.architecture.decoder.vocab_size, (1, int(sys.argv[2])))
for name in ("compile_and_first", "second"):
    start = time.perf_counter()
    logits = model.logits(tokens_BT)
    seconds[name] = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps({
    "seconds": seconds, "loaded_bytes": loaded - before, "peak_bytes": max(seen) - before,
    "file_bytes": status_bytes("RssFile"), "logits": hashlib.sha256(logits.tobytes()).hexdigest(),
}))
"""


def main(run: command.Command) -> None:
    """Writes what is missing, then loads each folder in turn."""
    from moe_jax import checkpoint

    folders = {name: run.out / name for name in ("published", "stacked")}
    with run.timed("write"):
        write(folders, run.config)
    if checkpoint.open(folders["stacked"]).architecture != run.config.architecture:
        raise ValueError(f"{run.out} holds a model of another shape: remove it, or give another --out")
    found, figures = {}, {}
    with run.timed("run"):
        for name, folder in folders.items():
            files = sorted(folder.glob("*.safetensors"))
            cached = sum(map(drop, files)) / sum(path.stat().st_size for path in files)
            command_line = [sys.executable, "-c", LOAD, str(folder), str(TOKENS)]
            done = subprocess.run(command_line, check=True, stdout=subprocess.PIPE, cwd=ROOT)
            one = found[name] = json.loads(done.stdout)
            figures[f"{name}_cached"] = {"value": cached, "unit": "1"}
            figures |= {f"{name}_{phase}": {"value": s, "unit": "s"} for phase, s in one["seconds"].items()}
            for what in ("loaded", "peak", "file"):
                figures[f"{name}_{what}"] = {"value": one[f"{what}_bytes"] / 1e9, "unit": "GB"}
    same = found["published"]["logits"] == found["stacked"]["logits"]
    lines = [f"{name:28} {figure['value']:8.3f} {figure['unit']}" for name, figure in figures.items()]
    run.finish(figures, text="\n".join([*lines, f"logits are {'the same' if same else 'DIFFERENT'}, bit for bit"]))
    return 0 if same else 1


def write(folders: dict[str, pathlib.Path], config) -> None:
    """Writes random weights in bfloat16 in both layouts unless they exist."""
    from moe_jax import conversion
    from moe_jax.checkpoint import huggingface
    from moe_jax.study.random_model import random_params

    if not folders["published"].exists():
        params = random_params(config.architecture, "bfloat16", config.run.seed)
        huggingface.write_checkpoint(
            folders["published"], config.architecture, params, dtype="auto", model_type="olmoe"
        )
        del params
    if not folders["stacked"].exists():
        conversion.convert(folders["published"], folders["stacked"], layout="stacked")


def drop(path: pathlib.Path) -> int:
    """Tells the system to drop a file's pages; returns how many bytes it kept."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            kept = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), kept)
            del start
    return sum(one & 1 for one in kept) * mmap.PAGESIZE


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_stacked.gin"),
        default_out="out/stacked",
    )
