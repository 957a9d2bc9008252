"""Times moe_jax, transformers and llama.cpp on one checkpoint of random weights, in one run, in turn.

    pip install -r requirements-benchmark.txt
    python benchmarks/peers.py --config configs/benchmark_peers.gin --out out/peers

The model has the configured shape, in bfloat16 (4 GB in OUT, kept for the next run). Each system runs in its own
process with one thread per core; all read the same tokens. transformers runs with each of its implementations of
experts, and once in float32. A step is timed from tokens on the host to logits, or a token, on the host. Use
--notransformers if torch is not installed.
"""

import math
import multiprocessing
import os
import pathlib
import statistics
import traceback

from absl import flags

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
PROMPT = 128  # tokens in the cache when timing of decoding starts
CASES = {"decode_1": 1, "decode_8": 8}  # rows
PREFILL = 512  # tokens
SLOW_STEPS = 2  # for systems in which a step may take seconds
WITH_TRANSFORMERS = flags.DEFINE_bool("transformers", True, "Also run transformers.")
TRANSFORMERS = (("bfloat16", "eager"), ("bfloat16", "grouped_mm"), ("bfloat16", "batched_mm"), ("float32", "eager"))


class Process:
    """A system in its own process; its methods are called by name."""

    def __init__(self, module: str, *arguments, **options):
        context = multiprocessing.get_context("spawn")
        self._calls, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end, module, arguments, options), daemon=True)
        self._process.start()
        child_end.close()
        self._answer()

    def _answer(self):
        try:
            failed, answer = self._calls.recv()
        except EOFError:
            raise ValueError(f"a system ended with status {self._process.exitcode}") from None
        if failed:
            raise ValueError(answer)
        return answer

    def call(self, method: str, *arguments):
        """Calls a method in the process and returns its result."""
        self._calls.send((method, arguments))
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._calls.close()
        self._process.join()


def _serve(calls, module: str, arguments, options) -> None:
    import importlib

    def answer(function):
        try:
            calls.send((False, function()))
        except Exception as error:
            traceback.print_exc()
            calls.send((True, f"{module}: {error}"))

    system = None

    def make():
        nonlocal system
        system = importlib.import_module(f"systems.{module}").System(*arguments, **options)

    answer(make)
    while True:
        try:
            method, given = calls.recv()
        except EOFError:
            return
        answer(lambda method=method, given=given: getattr(system, method)(*given))


def main(run: command.Command) -> None:
    """Writes the checkpoint, starts every system, and times each case in every round."""
    import numpy as np
    import tqdm

    rounds, steps, threads = run.config.benchmark.rounds, run.config.benchmark.decode_steps, os.cpu_count()
    with run.timed("write"):
        folder, gguf = write_checkpoint(run)
    vocab_size = run.config.decoder.vocab_size
    length = PROMPT + (rounds + 2) * steps + rounds
    random = np.random.default_rng(run.config.run.seed)
    tokens_BT = {rows: random.integers(0, vocab_size, (rows, length)) for rows in CASES.values()}
    prompt_T = random.integers(0, vocab_size, PREFILL)
    starts = {
        "moe_jax": lambda: Process("ours", str(folder), threads),
        "llama.cpp": lambda: Process("llama_cpp", str(gguf), threads, tokens=max(length, PREFILL)),
    }
    for dtype, experts in TRANSFORMERS if WITH_TRANSFORMERS.value else ():
        starts[f"transformers {experts} {dtype}"] = lambda dtype=dtype, experts=experts: Process(
            "huggingface", str(folder), threads, dtype=dtype, experts=experts
        )
    seconds: dict[str, dict[str, list[float]]] = {}
    floors: dict[str, list[float]] = {case: [] for case in CASES}
    logits = {}

    def turn(name, system, count):
        times = seconds.setdefault(name, {})
        prefill_s = system.call("prefill", prompt_T)
        times.setdefault(f"prefill_{PREFILL}", []).append(math.nan if prefill_s is None else prefill_s)
        for case, rows in CASES.items():
            times.setdefault(case, []).extend(system.call("decode", tokens_BT[rows], PROMPT, count))
            if name == "moe_jax":
                floors[case].append(system.call("floor_ms", tokens_BT[rows], PROMPT))

    with run.timed("run"):
        always = {}
        for name in ("moe_jax", "llama.cpp"):
            always[name] = starts.pop(name)()
            logits[name] = always[name].call("logits", prompt_T)
            turn(name, always[name], steps)  # warm
        seconds.clear()
        for floors_ms in floors.values():
            floors_ms.clear()
        # transformers' processes run one at a time: their weights would not all fit in memory
        shares = np.array_split(np.arange(rounds), max(1, len(starts)))
        with tqdm.tqdm(total=rounds, unit="round", disable=None) as bar:
            for (name, start), share in zip(starts.items() or [("", None)], shares):
                system = start and start()
                if system:
                    logits[name] = system.call("logits", prompt_T)
                for _ in share:
                    for other, one in always.items():
                        turn(other, one, steps)
                    if system:
                        turn(name, system, SLOW_STEPS)
                    bar.update()
                if system:
                    system.close()
        for system in always.values():
            system.close()
    figures, text = _result(seconds, floors, logits)
    run.finish(figures, text=text)


def write_checkpoint(run: command.Command) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the checkpoint and the GGUF file unless they exist; returns their paths."""
    from systems import gguf_file

    from moe_jax import checkpoint, files
    from moe_jax.checkpoint import huggingface
    from moe_jax.study.random_model import random_params

    config = run.config
    folder, gguf = run.out / "checkpoint", run.out / "model.gguf"
    if not folder.exists():
        params = random_params(config.architecture, "bfloat16", config.run.seed)
        huggingface.write_checkpoint(folder, config.architecture, params, model_type="olmoe")
        gguf.unlink(missing_ok=True)
    if checkpoint.open(folder).architecture != config.architecture:
        raise ValueError(f"{folder} holds another model: remove it, or give another --out")
    if not gguf.exists():
        partial = files.partial_sibling(gguf)
        gguf_file.write(folder, partial)
        os.replace(partial, gguf)
    return folder, gguf


def _result(seconds, floors, logits) -> tuple[dict, str]:
    """The figures and the table."""
    import numpy as np

    ms = {
        name: {case: 1e3 * statistics.median(values) for case, values in cases.items()}
        for name, cases in seconds.items()
    }
    figures, lines = {}, [f"{'median ms':32}" + "".join(f"{case:>14}" for case in ms["moe_jax"])]
    for name, cases in ms.items():
        lines.append(f"{name:32}" + "".join(f"{value:14.2f}" for value in cases.values()))
        for case, value in cases.items():
            figures[f"{name} {case}"] = {"value": value, "unit": "ms"}
    for case, floors_ms in floors.items():
        figures[f"floor {case}"] = {"value": statistics.median(floors_ms), "unit": "ms"}
    streamed = "".join(f"{statistics.median(floors_ms):14.2f}" for floors_ms in floors.values())
    lines.append(f"{'weights and cache streamed once':32}{'':14}{streamed}")
    others = {"llama.cpp": ms["llama.cpp"]}
    if variants := [cases for name, cases in ms.items() if name.startswith("transformers")]:
        others["transformers' best"] = {
            case: min(cases[case] for cases in variants if not math.isnan(cases[case])) for case in ms["moe_jax"]
        }
    for name, other in others.items():
        ratios = {case: other[case] / value for case, value in ms["moe_jax"].items()}
        figures |= {f"speed over {name} {case}": {"value": value, "unit": "1"} for case, value in ratios.items()}
        lines.append(f"{'speed over ' + name:32}" + "".join(f"{value:14.2f}" for value in ratios.values()))
    for name, other in logits.items():
        if name != "moe_jax":
            difference = np.linalg.norm(other - logits["moe_jax"]) / np.linalg.norm(logits["moe_jax"])
            figures[f"logits of {name}"] = {"value": float(difference), "unit": "relative difference"}
            lines.append(f"{'logits of ' + name:32}{difference:14.4f} off")
    return figures, "\n".join(lines)


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_peers.gin"),
        default_out="out/peers",
        huge_pages=True,
    )
