"""Times many short prompts and a long one, in one batch and in two: what the long one costs the others.

    python benchmarks/uneven_prompts.py --out out/uneven_prompts

The model has random weights in float32 and the shape of --config. 63 prompts of 20 tokens and one of 4,000 are
continued by 64 tokens each: in one batch, then the short ones and the long one in separate batches. Every round times
all batches in turn; programs are compiled before.
"""

import os
import pathlib
import statistics
import time

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
SHORT, LONG, NEW = (63, 20), (1, 4000), 64  # (prompts, tokens of each); new tokens of each


def main(run: command.Command) -> None:
    """Draws a model, then times every batch in every round."""
    import jax
    import numpy as np
    import tqdm

    from moe_jax.config.schema import SamplingConfig
    from moe_jax.engine.generate import Engine
    from moe_jax.engine.request import execution_of, make_requests
    from moe_jax.study.random_model import random_params
    from moe_jax.text.tokenizer import load_tokenizer

    architecture, rounds = run.config.architecture, run.config.benchmark.rounds
    execution = execution_of(architecture, 0, run.config.kernels)
    run.implementations |= execution.implementations
    params = jax.device_put(random_params(architecture, "float32", run.config.run.seed))
    engine = Engine(params, load_tokenizer(ROOT / "assets" / "demo"), ())
    random = np.random.default_rng(run.config.run.seed)

    def prompts(count, length):
        return random.integers(0, architecture.decoder.vocab_size, (count, length)).tolist()

    short, long = prompts(*SHORT), prompts(*LONG)
    sampling = SamplingConfig(max_new_tokens=NEW)
    batches = {
        name: make_requests(prompts, None, execution, sampling=sampling)
        for name, prompts in (("together", short + long), ("short", short), ("long", long))
    }
    with run.timed("compile"):
        for requests in batches.values():
            engine.run(requests, execution)
    seconds = {name: [] for name in batches}
    with run.timed("run"):
        for _ in tqdm.tqdm(range(rounds), unit="round", disable=None):
            for name, requests in batches.items():
                began = time.perf_counter()
                engine.run(requests, execution)
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    over = median["together"] / (median["short"] + median["long"])
    figures = {name: {"value": value, "unit": "s"} for name, value in median.items()}
    figures["together_over_apart"] = {"value": over, "unit": "1"}
    texts = ", ".join(f"{name} {value:.2f} s" for name, value in median.items())
    run.finish(figures, text=f"{texts}: together {over:.2f} of the two apart")


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_long_prompts.gin"),
        default_out="out/uneven_prompts",
        huge_pages=True,
    )
