"""Times decode steps and prefills of a model, and compares them with the least time that this machine allows.

    python launch/benchmark.py --config configs/benchmark_demo.gin --out out/benchmark --trace

The model is that of model.path or, if that is "", one of the configured shape with random weights, whose routing is
replayed from a trained model (benchmark.trace). The machine's memory bandwidth and matmul rate are measured first, and
again in every round. With --trace, a profile of every case goes to OUT/trace, for Perfetto or XProf.

With --tune, the tile sizes of the model's expert products are timed instead, and the fastest are written into the table
that the kernels look them up in (`moe_jax/kernels/grouped_matmul/tuned.json`).

With benchmark.dispatch_slots, what each dispatch sends is counted instead, on eight virtual devices of the CPU.
"""

import os
import pathlib

from absl import flags

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
SPARE_STEPS = 2  # extra steps of each decode case: one to warm up, one for the profile

TRACE = flags.DEFINE_bool("trace", False, "Write a profile of every case to OUT/trace.")
TUNE = flags.DEFINE_bool("tune", False, "Time the tile sizes of the kernels instead, and keep the fastest.")


def main(run: command.Command) -> None:
    """Measures the machine, compiles every case, and times the cases in turn; or times tile sizes, or counts."""
    if TUNE.value:
        return tune(run)
    if run.config.benchmark.dispatch_slots:
        return count_sent(run)
    import tqdm

    from moe_jax.cost import hardware
    from moe_jax.model.dtypes import dtype_of, expert_itemsize
    from moe_jax.study import speed
    from moe_jax.study.timing import timing_of

    config = run.config
    model, tokens_of, routing = prepare(run)
    architecture = model.execution.architecture
    permitted, left_out = cases_of(config.benchmark, architecture.decoder.max_context)
    dtype = dtype_of(model.engine.params)
    with run.timed("machine"):
        probe = hardware.Probe(dtype)
        machines = [probe.measure()]
    with run.timed("compile"):
        cases = []
        for phase, rows, length in permitted:
            tokens_BT = tokens_of(rows, length)
            cases.append(
                speed.Prefill(model, tokens_BT[0])
                if phase == "prefill"
                else speed.Decode(model, tokens_BT, config.benchmark.prompt_length)
            )
            cases[-1].take(1)
    with run.timed("run"):
        steps = [1 if phase == "prefill" else config.benchmark.decode_steps for phase, _, _ in permitted]
        samples = {case.name: [] for case in cases}
        for _ in tqdm.trange(config.benchmark.rounds, unit="round", disable=None):
            for case, taken in zip(cases, speed.take_turns(cases, steps)):
                samples[case.name] += taken
            machines.append(probe.measure())
    machine = hardware.typical(machines)
    how = model.execution, machine, dtype.itemsize, expert_itemsize(model.engine.params)
    timings = [timing_of(case, samples[case.name], *how) for case in cases]
    if TRACE.value:
        speed.profile(cases, run.out / "trace")
    figures = figures_of(timings, machines)
    run.finish(figures, text=table(timings, figures, dtype.name, routing, left_out))


def tune(run: command.Command) -> None:
    """Times the tile sizes of the model's expert products at the configured numbers of tokens."""
    from moe_jax.study import tiles

    config = run.config
    if config.model.path:
        opened, execution = run.open_model()
        dtype = opened.expected_dtype if config.model.dtype == "auto" else config.model.dtype
    else:
        dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
        execution = run.execution_of(config.architecture, dtype)
    kernels = execution.kernels.grouped_matmul
    if kernels not in tiles.TUNABLE:
        raise ValueError(
            f"--tune: kernels.grouped_matmul is {kernels!r} here, which has no tile sizes to choose: expected "
            f"{', '.join(tiles.TUNABLE)}, on a device of its own"
        )
    tokens = config.benchmark.decode_batches, config.benchmark.prefill_lengths
    figures, lines = {}, []
    with run.timed("run"):
        for timed in tiles.tune(execution.architecture, dtype, *tokens, config.benchmark.rounds, config.run.seed):
            for one in timed:
                case = f"{one.tokens}_{one.case.product}_{one.case.outputs}x{one.case.inputs}"
                figures[f"{case}_{'x'.join(map(str, one.tiles))}"] = {"value": one.microseconds, "unit": "us"}
                lines.append(f"{case:36}{one.tiles!s:22}{one.microseconds:10.1f} us{' *' * (one is timed[0])}")
    run.finish(figures, text="\n".join([*lines, "* written into tuned.json"]))


def count_sent(run: command.Command) -> None:
    """Counts what a token sends in one MoE layer, by dispatch and slots per token."""
    from moe_jax.study import sent

    config = run.config
    with run.timed("run"):
        by_slots = sent.rows_per_token(
            config.decoder.d_model, config.moe, config.benchmark.dispatch_slots, config.run.seed
        )
    figures, lines = {}, [" k " + " ".join(f"{name:>11}" for name in (*sent.NAMES, "tensor"))]
    for k, rows in by_slots.items():
        figures |= {f"{name}_{k}": {"value": value, "unit": "rows per token"} for name, value in rows.items()}
        lines.append(f"{k:2} " + " ".join(f"{value:11.2f}" for value in rows.values()))
    run.finish(figures, text="\n".join(lines))


def virtual_devices(config) -> int:
    """The devices to make on the CPU, for counting what they send each other; 0: the machine's own."""
    if not config.benchmark.dispatch_slots:
        return 0
    from moe_jax.study import sent

    return sent.DEVICES


def prepare(run: command.Command):
    """Checks the configuration, then loads or makes the model.

    Returns:
        The model to time; a function (rows, length) -> tokens_BT to read; and where the routing comes
        from, in words.
    """
    from moe_jax.engine.generate import Engine
    from moe_jax.engine.request import make_requests
    from moe_jax.routing import trace as traces
    from moe_jax.routing.policies import fixed_k
    from moe_jax.routing.policies.parse import parse
    from moe_jax.study.random_model import random_params
    from moe_jax.study.speed import TimedModel

    config = run.config
    opened, dtype = None, "float32" if config.model.dtype == "auto" else config.model.dtype
    if config.model.path:
        opened, execution = run.open_model()
    else:
        execution = run.execution_of(config.architecture, dtype, expert_dtype=config.model.eight_bits)
    architecture = execution.architecture
    policy = parse(config.policy.spec, None if opened is None else opened.calibration)
    make_requests([[0]], None, execution, sampling=config.sampling, policy=policy)  # checks the settings
    cases_of(config.benchmark, architecture.decoder.max_context)
    trace = None
    if opened is None and config.benchmark.trace:
        trace = traces.read(command.in_repository(config.benchmark.trace, "benchmark.trace"))
        trace.require(architecture.moe.num_experts, execution.k_max)
        if fixed_k(policy, architecture) is None:
            raise ValueError(
                f"policy.spec = {policy.spec!r}: recorded routing is the full model's; expected a policy with a fixed "
                "number of experts per layer; launch/sweep.py replays the choices of other policies"
            )
    routing = "of random routers" if trace is None else f"replayed from {config.benchmark.trace}"
    if opened is not None:
        tokens_of = held_out_tokens(config.text.held_out, opened.require_tokenizer())
        engine, routing = run.load(opened).engine, "the model's own, on held-out text"
    else:
        tokens_of = random_tokens(architecture.decoder.vocab_size, config.run.seed)
        with run.timed("load"):
            params = random_params(architecture, dtype, config.run.seed, config.model.eight_bits)
            engine = Engine(params, None, ())
    return TimedModel(engine, execution, policy, config.sampling, trace), tokens_of, routing


def cases_of(benchmark, max_context: int) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(phase, rows, tokens per row) of every case that fits in the context, and the names of the others."""
    length = benchmark.prompt_length + benchmark.rounds * benchmark.decode_steps + SPARE_STEPS
    if benchmark.decode_batches and length > max_context:
        raise ValueError(
            f"benchmark.prompt_length, and {benchmark.rounds} benchmark.rounds of {benchmark.decode_steps} "
            f"benchmark.decode_steps, take {length} tokens per row: expected at most the model's context, {max_context}"
        )
    permitted = [("decode", rows, length) for rows in benchmark.decode_batches]
    permitted += [("prefill", 1, length) for length in benchmark.prefill_lengths if length < max_context]
    left_out = [f"prefill_{length}" for length in benchmark.prefill_lengths if length >= max_context]
    if not permitted:
        raise ValueError(f"benchmark.prefill_lengths: expected some below the model's context, {max_context}")
    return permitted, left_out


def random_tokens(vocab_size: int, seed: int):
    """(rows, length) -> tokens_BT, drawn from the vocabulary."""
    import numpy as np

    return lambda rows, length: np.random.default_rng(seed).integers(0, vocab_size, (rows, length), np.int32)


def held_out_tokens(held_out: str, tokenizer):
    """(rows, length) -> tokens_BT of held-out text; rows begin at evenly spaced places in it."""
    import numpy as np

    from moe_jax.text.held_out import load_held_out

    documents = load_held_out(command.in_repository(held_out, "text.held_out"))
    ring = np.concatenate([tokenizer.encode(document.text).ids for document in documents])

    def tokens_of(rows, length):
        return ring[(np.arange(rows)[:, None] * len(ring) // rows + np.arange(length)[None, :]) % len(ring)]

    return tokens_of


def figures_of(timings, machines) -> dict:
    """The figures of result.json."""
    import numpy as np

    figures = {}
    for name, unit, field in (("bandwidth", "GB/s", "bytes_per_s"), ("matmul_rate", "GFLOP/s", "flops_per_s")):
        measured = [getattr(machine, field) / 1e9 for machine in machines]
        first, median, third = np.percentile(measured, (25, 50, 75)).tolist()
        figures[name] = {"value": median, "unit": unit, "quartiles": [first, third], "best": max(measured)}
    for timing in timings:
        first_ms, median_ms, third_ms = timing.quartiles_ms
        case_figures = {
            "ms": {"value": median_ms, "unit": "ms", "quartiles": [first_ms, third_ms]},
            "tokens_per_s": {"value": timing.tokens_per_s, "unit": "tokens/s"},
            "bytes": {"value": timing.bytes, "unit": "bytes"},
            "flops": {"value": timing.flops, "unit": "flops"},
            "floor_ms": {"value": timing.floor_ms, "unit": "ms"},
            "over_floor": {"value": timing.over_floor, "unit": "1"},
            "distinct_experts_per_layer_step": {"value": timing.distinct_experts, "unit": "experts"},
            "independent_experts_per_layer_step": {"value": timing.independent_experts, "unit": "experts"},
        }
        figures |= {f"{timing.case}_{name}": figure for name, figure in case_figures.items()}
    return figures


def table(timings, figures: dict, dtype: str, routing: str, left_out: list[str]) -> str:
    """The figures for people."""
    bandwidth, rate = figures["bandwidth"], figures["matmul_rate"]
    lines = [
        f"{bandwidth['value']:.1f} GB/s (at best {bandwidth['best']:.1f}), {rate['value']:.0f} GFLOP/s in {dtype} "
        f"(at best {rate['best']:.0f}); routing {routing}",
        f"{'':14}{'ms':>9} {'quartiles':>19} {'tokens/s':>9} {'MB':>8} {'GFLOP':>8} {'floor ms':>9} {'over':>6}"
        f" {'distinct':>9} {'if even':>8}",
    ]
    for timing in timings:
        first_ms, median_ms, third_ms = timing.quartiles_ms
        lines.append(
            f"{timing.case:14}{median_ms:9.2f} {first_ms:9.2f}-{third_ms:<9.2f} {timing.tokens_per_s:9.1f}"
            f" {timing.bytes / 1e6:8.1f} {timing.flops / 1e9:8.2f} {timing.floor_ms:9.3f} {timing.over_floor:6.2f}"
            f" {timing.distinct_experts:9.2f} {timing.independent_experts:8.2f}"
        )
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}: no room for the next token in the model's context")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_demo.gin"),
        default_out="out/benchmark",
        huge_pages=True,
        virtual_devices=virtual_devices,
    )
