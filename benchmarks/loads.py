"""Times decode steps of a model with random weights, over loads, under several policies.

    python benchmarks/loads.py --config configs/loads_olmoe.gin --out out/loads
    python benchmarks/loads_chart.py out/loads

A load is the number of rows that are decoded together, `benchmark.decode_batches`; the policies are those of
`sweep.policies`. The demo's routing is replayed (benchmark.trace): policies of a fixed number of experts keep the best
of each token; what those that look at all rows keep is decided before, from the order of the recorded experts
(`moe_jax/study/decided.py`). Each call of the compiled step takes `benchmark.decode_steps` steps after
`benchmark.prompt_length` tokens in the cache, which are zeros.

Policies that share a compiled step take turns at each load. OUT/loads.jsonl gets a line for each policy and load as
soon as it is measured, so a run that is cut off keeps what it has.
"""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Sequence

from moe_jax import command
from moe_jax.config.schema import BenchmarkConfig

ROOT = pathlib.Path(__file__).parents[1]
COMPILED_AT_ONCE = 12


def main(run: command.Command) -> None:
    """Checks the settings, makes the weights, then compiles and times the first group of policies, then the others."""
    from moe_jax.cost import hardware
    from moe_jax.engine.generate import Engine
    from moe_jax.routing import trace as traces
    from moe_jax.study.random_model import random_params

    config, benchmark = run.config, run.config.benchmark
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    execution = run.execution_of(config.architecture, dtype, expert_dtype=config.model.eight_bits)
    groups = grouped(config.sweep.policies, execution)
    trace = traces.read(command.in_repository(benchmark.trace, "benchmark.trace"))
    trace.require(config.moe.num_experts, execution.k_max)
    with run.timed("load"):
        params = random_params(config.architecture, dtype, config.run.seed, config.model.eight_bits)
        engine = Engine(params, None, ())
    made_with = {"device": hardware.in_words(), "kernels": execution.kernels.grouped_matmul}
    path, lines = run.out / "loads.jsonl", []
    path.write_text("")

    def prepare(group_and_load):
        group, load = group_and_load
        return compiled(rows_of(engine, execution, load, benchmark, abstract=True), group, trace, benchmark)

    # compiling side by side saves time, but what is first is kept if it is cut off
    for part in groups[:1], groups[1:]:
        cases = [(group, load) for group in part for load in benchmark.decode_batches]
        with run.timed("compile"), concurrent.futures.ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            chosen = list(pool.map(prepare, cases))
        for (group, load), chosen_PSLBK in zip(cases, chosen, strict=True):
            with run.timed("run"):
                rows = rows_of(engine, execution, load, benchmark)
                measured = measure(cases_of(rows, group, chosen_PSLBK, benchmark), group, execution, benchmark)
                del rows  # and its cache, before the next one is made
            lines += [{**line, **made_with} for line in measured]
            with open(path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines[-len(measured) :])
            for line in measured:
                print("{policy:30}{load:5} rows{ms:10.3f} ms{tokens_per_s:11.1f} tokens/s".format(**line), flush=True)
    rows = [{"policy": spec, "figures": figures_of(lines, spec)} for spec in config.sweep.policies]
    run.finish(rows[0]["figures"], rows=rows)


def grouped(specs: Sequence[str], execution) -> list[list]:
    """The policies in groups that share a compiled step, in the order of the first of each.

    Raises:
        ValueError: one does not parse, does not fit the model, or needs more than the order of a token's experts.
    """
    from moe_jax.routing import policies
    from moe_jax.routing.policies.kind import StepWise
    from moe_jax.routing.policies.parse import parse
    from moe_jax.study.decided import require_ranks

    groups: dict[tuple, list] = {}
    for policy in map(parse, specs):
        require_ranks(policy)
        policies.settings([policy], execution.architecture, execution.k_max)
        groups.setdefault(tuple(type(part) for part in policy.parts if isinstance(part, StepWise)), []).append(policy)
    return list(groups.values())


def rows_of(engine, execution, load: int, benchmark: BenchmarkConfig, abstract: bool = False):
    """Rows with room for the steps of a call."""
    from moe_jax.study.speed import Rows

    room = benchmark.prompt_length, benchmark.decode_steps
    return Rows.of_zeros(engine, execution, load, *room, abstract=abstract)


def compiled(rows, group: Sequence, trace, benchmark: BenchmarkConfig) -> list:
    """What each policy of a group keeps of the same recorded experts; compiles their step."""
    import numpy as np

    from moe_jax.study.decided import decide

    architecture, steps = rows.execution.architecture, benchmark.rounds * benchmark.decode_steps
    sizes = architecture.decoder.num_moe_layers, architecture.moe.num_experts, rows.execution.k_max
    expert_SLBK = np.moveaxis(trace.replay(*sizes, rows.count, steps), 2, 0)
    chosen_PSLBK = [decide(policy, expert_SLBK, rows.execution) for policy in group]
    cases_of(rows, group, chosen_PSLBK, benchmark)[0].compile()
    return chosen_PSLBK


def cases_of(rows, group: Sequence, chosen_PSLBK: Sequence, benchmark: BenchmarkConfig) -> list:
    """A case for each policy of a group."""
    from moe_jax.study.speed import Replay

    at = benchmark.prompt_length
    return [Replay(rows, at, *one, benchmark.decode_steps) for one in zip(group, chosen_PSLBK, strict=True)]


def measure(cases: Sequence, group: Sequence, execution, benchmark: BenchmarkConfig) -> list[dict]:
    """Times the policies of a group at one load, in turn: a line for each."""
    import numpy as np

    from moe_jax.study import speed

    samples = [[] for _ in cases]
    for _ in range(benchmark.rounds):
        taken = speed.take_turns(cases, [benchmark.decode_steps] * len(cases))
        for all_samples, new in zip(samples, taken, strict=True):
            all_samples += new
    lines = []
    for policy, case, taken in zip(group, cases, samples, strict=True):
        first_ms, median_ms, third_ms = np.percentile([1e3 * one.seconds for one in taken], (25, 50, 75)).tolist()
        layer_steps = len(taken) * execution.architecture.decoder.num_moe_layers
        lines.append(
            {
                "policy": policy.spec,
                "load": case.tokens,
                "ms": median_ms,
                "quartiles_ms": [first_ms, third_ms],
                "tokens_per_s": 1e3 * case.tokens / median_ms,
                "distinct_experts": sum(one.step.distinct_experts for one in taken) / layer_steps,
                "experts_per_token": sum(one.step.kept_slots for one in taken) / layer_steps / case.tokens,
            }
        )
    return lines


def figures_of(lines: Sequence[dict], spec: str) -> dict:
    """The figures of one policy."""
    units = {"ms": "ms", "tokens_per_s": "tokens/s", "distinct_experts": "experts", "experts_per_token": "experts"}
    return {
        f"decode_{line['load']}_{name}": {"value": line[name], "unit": unit}
        for line in lines
        if line["policy"] == spec
        for name, unit in units.items()
    }


if __name__ == "__main__":
    command.run(main, default_config=os.path.relpath(ROOT / "configs" / "loads_olmoe.gin"), default_out="out/loads")
