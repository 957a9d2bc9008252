"""Settings of predictions: the load, the machine, the measured tables to fit, and the policies to predict."""

import dataclasses
import os

from moe_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Throughput and latency of the configured model on a server, from a model of its steps fitted to a measured table.

    A table is a CSV file: `concurrency`, then tokens per second, read and written, with k active experts (`k6`) or with
    E experts in total (`e64`) in a closed loop.
    """

    measured: tuple[str, ...] = ("assets/published/throughput_v2lite_active.csv",)  # the first gives the constants
    columns: tuple[str, ...] = ("k6",)  # of each table, the one that is fitted; the others are predicted
    measured_config: str = ""  # config of the model in the tables, if it is another one
    devices: int = 2
    device_bytes_per_s: float = 2.039e12  # peak of one device
    device_flops_per_s: float = 312e12
    weight_bytes: int = 2  # of a weight, as it is stored and read
    cache_bytes: int = 2  # of a number in the cache
    prompt_tokens: int = 1024  # of each request
    output_tokens: int = 1024
    prefill_tokens: int = 8192  # of prompts that the server reads together
    routing: str = "assets/demo"  # checkpoint whose routing on text.held_out stands in for that of the model
    policies: tuple[str, ...] = ("model", "topk:4")
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # of a closed loop
    max_rows: int = 128  # requests that the server decodes together, in the simulation of open arrivals
    loads: tuple[float, ...] = (0.5, 0.8, 0.95)  # arrivals, over what the full model serves with max_rows clients
    variations: tuple[float, ...] = (1.0, 8.0)  # variance of the time between arrivals over its mean squared
    requests: int = 2000  # simulated, for each policy, load and variation (1: Poisson arrivals, more: bursts)

    def __post_init__(self):
        require(len(self.measured) > 0, "predict.measured", self.measured, "at least one table")
        tables = [os.path.basename(path) for path in self.measured]
        require(len(set(tables)) == len(tables), "predict.measured", self.measured, "tables with different names")
        one_each = f"one for each of {len(self.measured)} predict.measured"
        require(len(self.columns) == len(self.measured), "predict.columns", self.columns, one_each)
        sizes = "devices", "device_bytes_per_s", "device_flops_per_s", "weight_bytes", "cache_bytes"
        require_positive("predict", self, *sizes, "prompt_tokens", "prefill_tokens", "max_rows")
        require(self.output_tokens >= 2, "predict.output_tokens", self.output_tokens, "2 or more")
        require(self.requests >= 10, "predict.requests", self.requests, "10 or more")
        require(len(self.policies) > 0, "predict.policies", self.policies, "at least one policy")
        for field in ("policies", "concurrencies", "loads", "variations"):
            given = getattr(self, field)
            require(len(set(given)) == len(given), f"predict.{field}", given, "each once")
        given = self.concurrencies
        require(len(given) > 0 and min(given) > 0, "predict.concurrencies", given, "positive numbers")
        expected = f"one of at least predict.max_rows = {self.max_rows}"
        require(max(given) >= self.max_rows, "predict.concurrencies", given, expected)
        for field in ("loads", "variations"):
            given = getattr(self, field)
            require(all(0 < one < float("inf") for one in given), f"predict.{field}", given, "positive numbers")
