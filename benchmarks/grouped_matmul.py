"""Times grouped matmul alone: against its floor, a dense product of the same rows, and itself with fewer experts.

    python benchmarks/grouped_matmul.py --config configs/benchmark_grouped_matmul.gin --out out/grouped_matmul

Tokens choose their experts uniformly at random. Every round times all cases in turn, so that a slow moment of the
machine affects all of them; figures are medians.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import time

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 9
SLOW_ROUNDS = 2  # for ragged_dot, which takes seconds on a CPU
TOKENS = (1, 8, 64, 512)


def main(run: command.Command) -> None:
    """Draws weights and rows, times every case, and prints a table."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe_jax.kernels import chooser
    from moe_jax.kernels.grouped_matmul.api import grouped_matmul

    moe, d_model = run.config.moe, run.config.decoder.d_model
    asked = dataclasses.asdict(run.config.kernels)
    chosen = chooser.resolve(jax.default_backend(), run.config.architecture, "float32", asked).grouped_matmul
    run.implementations["grouped_matmul"] = chosen
    key = jax.random.key(run.config.run.seed)
    weights_LEFD = jax.random.normal(key, (1, moe.num_experts, moe.expert_hidden, d_model))
    rng = np.random.default_rng(run.config.run.seed)
    matrix_bytes = d_model * moe.expert_hidden * weights_LEFD.dtype.itemsize

    def sizes(tokens, k):
        """Rows per expert, other ones each time: small cases must not find their weights in a cache."""
        experts = np.concatenate([rng.choice(moe.num_experts, k, replace=False) for _ in range(tokens)])
        return jnp.asarray(np.bincount(experts, minlength=moe.num_experts), jnp.int32)

    def grouped(tokens, k, implementation):
        rows_SD = jax.random.normal(key, (tokens * moe.k, d_model))
        call = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
        return lambda: (call, (rows_SD, weights_LEFD, sizes(tokens, k), jnp.int32(0)))

    def dense(tokens):
        rows_SD = jax.random.normal(key, (tokens * moe.k, d_model))
        call = jax.jit(lambda rows_SD, weight_FD: rows_SD @ weight_FD.T)
        return lambda: (call, (rows_SD, weights_LEFD[0, 0]))

    cases = {"stream all weights": lambda: (jax.jit(jnp.sum), (weights_LEFD,))}
    for tokens in TOKENS:
        cases[f"{tokens} tokens, k={moe.k}"] = grouped(tokens, moe.k, chosen)
        cases[f"{tokens} tokens, k={moe.k // 4}"] = grouped(tokens, moe.k // 4, chosen)
        cases[f"{tokens} tokens, dense"] = dense(tokens)
    slow = {f"{tokens} tokens, ragged_dot": grouped(tokens, moe.k, "ragged_dot") for tokens in (TOKENS[0], TOKENS[-1])}

    def time_once(case):
        call, arguments = case()
        jax.block_until_ready(arguments)
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        return time.perf_counter() - start

    with run.timed("compile"):
        for case in (cases | slow).values():
            time_once(case)
    seconds = {name: [] for name in cases | slow}
    with run.timed("run"):
        for turn in range(ROUNDS):
            for name, case in (cases | slow if turn < SLOW_ROUNDS else cases).items():
                seconds[name].append(time_once(case))
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}

    stream_gb_per_s = weights_LEFD.nbytes / ms["stream all weights"] / 1e6
    full = f"{TOKENS[-1]} tokens"
    dense_gflop_per_s = 2 * TOKENS[-1] * moe.k * d_model * moe.expert_hidden / ms[f"{full}, dense"] / 1e6
    one_floor_ms = moe.k * matrix_bytes / stream_gb_per_s / 1e6
    figures = {
        "stream_bandwidth": {"value": stream_gb_per_s, "unit": "GB/s"},
        "dense_rate": {"value": dense_gflop_per_s, "unit": "GFLOP/s"},
        "ragged_dot_over_chosen_512": {"value": ms[f"{full}, ragged_dot"] / ms[f"{full}, k={moe.k}"], "unit": "1"},
        "over_dense_512": {"value": ms[f"{full}, k={moe.k}"] / ms[f"{full}, dense"], "unit": "1"},
        "over_stream_1": {"value": ms[f"1 tokens, k={moe.k}"] / one_floor_ms, "unit": "1"},
        "quarter_k_over_k_1": {"value": ms[f"1 tokens, k={moe.k // 4}"] / ms[f"1 tokens, k={moe.k}"], "unit": "1"},
    }
    figures |= {name: {"value": value, "unit": "ms"} for name, value in ms.items()}
    lines = [f"{name:30} {figure['value']:10.3f} {figure['unit']}" for name, figure in figures.items()]
    run.finish(figures, text="\n".join(lines))


if __name__ == "__main__":
    command.run(
        main, default_config=os.path.relpath(ROOT / "configs" / "benchmark_grouped_matmul.gin"), huge_pages=True
    )
