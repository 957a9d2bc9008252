"""Measures what this machine reaches: memory bandwidth, and the rate of a large matrix product.

A shared machine may be half as fast at some moments. So a benchmark measures the machine again in every round, and
compares its timings with the median.
"""

import datetime
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moe_jax.cost.roofline import Machine

STREAMED_BYTES = 2**30  # much larger than any cache
WIDTH = 2048  # of the square matrices that are multiplied
ATTEMPTS = 3  # per measurement; the best counts


class Probe:
    """Measures this machine repeatedly. Holds 1 GB of memory.

    Args:
        dtype: the dtype of the matrices that are multiplied; sums are float32.
    """

    def __init__(self, dtype: jnp.dtype):
        self._rows_ND = jnp.ones((STREAMED_BYTES // (4 * WIDTH), WIDTH), jnp.float32)
        self._vector_D = jnp.ones(WIDTH, jnp.float32)
        self._square = jnp.ones((WIDTH, WIDTH), dtype)
        self._sum = jax.jit(jnp.sum)
        self._sum_rows = jax.jit(lambda rows_ND: rows_ND.sum(axis=1))
        self._product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
        self.measure()  # compiles

    def measure(self) -> Machine:
        """Measures bandwidth and rate, each as the best of `ATTEMPTS`.

        Bandwidth is that of reading a float32 array: by its sum, by the sums of its rows or by its product with a
        vector, whichever is fastest. The rate is that of a product of square matrices.
        """
        streaming_s = min(
            _best_s(self._sum, self._rows_ND),
            _best_s(self._sum_rows, self._rows_ND),
            _best_s(self._product, self._rows_ND, self._vector_D),
        )
        product_s = _best_s(self._product, self._square, self._square)
        return Machine(self._rows_ND.nbytes / streaming_s, 2 * WIDTH**3 / product_s)


def typical(machines: Sequence[Machine]) -> Machine:
    """The medians of bandwidth and rate over several measurements."""
    return Machine(
        statistics.median(machine.bytes_per_s for machine in machines),
        statistics.median(machine.flops_per_s for machine in machines),
    )


def _best_s(call: Callable, *arguments: jax.Array) -> float:
    seconds = []
    for _ in range(ATTEMPTS):
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def in_words() -> str:
    """The devices, the version of JAX and the date, as text."""
    on_cpu = jax.devices()[0].platform == "cpu"
    count = f"{os.cpu_count()} cores" if on_cpu else f"{jax.device_count()} devices"
    return f"{kind()}, {count}; jax {jax.__version__}; {datetime.date.today().isoformat()}"


def kind() -> str:
    """The name of the first device; for a CPU, that of the processor."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
