"""Times the logits of long sequences in moe_jax and transformers, and the memory they take, in one run, in turn.

    pip install -r requirements-peers.txt
    python benchmarks/long_prompts.py --config configs/benchmark_long_prompts.gin --out out/long_prompts

The model is a small Qwen3-MoE with random weights in float32 (in OUT, kept for the next run). moe_jax runs twice, once
as on a machine without a C++ compiler. Each system reads each length in its own process, with one thread per core. The
first call includes compiling by XLA; the kernels in C++ are compiled before. Times are from tokens on the host to the
logits of every position on the host. Memory is the peak of the process, including libraries and weights.
"""

import os
import pathlib
import statistics

from peers import ROOT, Process

from moe_jax import command

SYSTEMS = {
    "moe_jax": ("ours", {"keep_compiled": False}),
    "moe_jax without a compiler": ("ours", {"keep_compiled": False, "compiler": False}),
    "transformers": ("huggingface", {"dtype": "float32", "experts": "grouped_mm"}),
}
PEER = "transformers"


def main(run: command.Command) -> None:
    """Writes the checkpoint, then times every system in turn at every length, round after round."""
    import numpy as np
    import tqdm

    lengths, rounds = run.config.benchmark.prefill_lengths, run.config.benchmark.rounds
    with run.timed("write"):
        folder = write_checkpoint(run)
        kernels = Process("ours", str(folder), os.cpu_count())
        kernels.call("whole", np.zeros(64, np.int32))
        kernels.close()
    random = np.random.default_rng(run.config.run.seed)
    figures, lines = {}, [f"{'':40}{'first s':>10}{'then s':>10}{'memory GB':>12}{'logits off':>12}"]
    with run.timed("run"), tqdm.tqdm(total=len(lengths) * (rounds + 1), unit="round", disable=None) as bar:
        for length in lengths:
            tokens_T = random.integers(0, run.config.decoder.vocab_size, length)
            systems = {
                name: Process(module, str(folder), os.cpu_count(), **options)
                for name, (module, options) in SYSTEMS.items()
            }
            calls = {name: [] for name in systems}
            for _ in range(rounds + 1):
                for name, system in systems.items():
                    calls[name].append(system.call("whole", tokens_T))
                bar.update()
            memory = {name: system.call("peak_memory_bytes") for name, system in systems.items()}
            for system in systems.values():
                system.close()
            new_figures, text = _result(length, calls, memory)
            figures |= new_figures
            lines += text
    run.finish(figures, text="\n".join(lines))


def write_checkpoint(run: command.Command) -> pathlib.Path:
    """Writes the checkpoint unless it exists; returns its folder."""
    from moe_jax import checkpoint
    from moe_jax.checkpoint import huggingface
    from moe_jax.study.random_model import random_params

    folder, architecture = run.out / "checkpoint", run.config.architecture
    if not folder.exists():
        params = random_params(architecture, "float32", run.config.run.seed)
        huggingface.write_checkpoint(folder, architecture, params, dtype="float32", model_type="qwen3_moe")
    if checkpoint.open(folder).architecture != architecture:
        raise ValueError(f"{folder} holds another model: remove it, or give another --out")
    return folder


def _result(length: int, calls, memory) -> tuple[dict, list[str]]:
    """The figures of one length, and its lines of the table."""
    import numpy as np

    by_system = {
        name: {
            "first": (taken[0][0], "s"),
            "then": (statistics.median(seconds for seconds, _ in taken[1:]), "s"),
            "memory": (memory[name] / 1e9, "GB"),
        }
        for name, taken in calls.items()
    }
    expected = calls[PEER][0][1]
    figures, lines = {}, []
    for name, values in by_system.items():
        off = float(np.linalg.norm(calls[name][0][1] - expected) / np.linalg.norm(expected))
        figures[f"{name} {length} logits"] = {"value": off, "unit": "relative difference"}
        texts = [f"{value:.2f}" for value, _ in values.values()]
        lines.append(f"{f'{length} {name}':40}{texts[0]:>10}{texts[1]:>10}{texts[2]:>12}{off:12.1e}")
        for what, (value, unit) in values.items():
            figures[f"{name} {length} {what}"] = {"value": value, "unit": unit}
        if name == PEER:
            continue
        over = {what: value / by_system[PEER][what][0] for what, (value, _) in values.items()}
        figures |= {
            f"{name} {length} {what} over {PEER}": {"value": value, "unit": "1"} for what, value in over.items()
        }
        lines.append(f"{'  over ' + PEER:40}" + "".join(f"{over[k]:{w}.2f}" for k, w in zip(over, (10, 10, 12))))
    return figures, lines


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_long_prompts.gin"),
        default_out="out/long_prompts",
    )
