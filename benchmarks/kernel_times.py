"""Times a compiled program: by the clock of the host, and on a GPU by what its profiler saw the device do.

The host launches kernels one by one. Where they take microseconds, the device waits for the next one, and the host's
clock says how fast it launches. So what is worked out of a time, such as bandwidth, is of the device's own time.
"""

import collections
import pathlib
import statistics
import tempfile
import time

import jax

TRACED_RUNS = 3
NAMED = 6  # kernels in a result, those that take longest


def time_of(call, arguments, calls: int) -> dict:
    """The time of one of `calls` calls in a program: by the host's clock, and on a GPU also the device's."""
    return _host(call, arguments, calls) | _device(call, arguments, calls)


def rate(amount: float, figures: dict) -> float:
    """What is done in a microsecond of the device's own time, or of the host's where there is no other."""
    return amount / (figures.get("device_us") or figures["us"])


def _host(call, arguments, calls: int, samples: int = 5) -> dict:
    """Median, least and largest of several samples; of one call where that takes a second or more."""
    jax.block_until_ready(call(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    once_s = time.perf_counter() - start
    if once_s > 1:  # a slow peer, or interpret mode
        return {"us": 1e6 * once_s / calls, "us_low": 0.0, "us_high": 0.0}
    repeats = max(1, min(50, int(0.02 / max(once_s, 1e-6))))
    times_us = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            out = call(*arguments)
        jax.block_until_ready(out)
        times_us.append(1e6 * (time.perf_counter() - start) / (repeats * calls))
    return {"us": statistics.median(times_us), "us_low": min(times_us), "us_high": max(times_us)}


def _device(call, arguments, calls: int) -> dict:
    """`device_us` of a call, and `kernels`: of each, microseconds and launches of a call; nothing off a GPU."""
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED_RUNS):
                out = call(*arguments)
            jax.block_until_ready(out)
        [path] = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        return summed(profile, TRACED_RUNS * calls)


def summed(profile, calls: int) -> dict:
    """The kernels and copies on the streams of a profile's GPUs, summed by name; empty if it has none."""
    total_ns, launches = collections.Counter(), collections.Counter()
    for plane in profile.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                total_ns[event.name] += event.duration_ns
                launches[event.name] += 1
    if not total_ns:
        return {}
    kernels = {name: [round(ns / 1e3 / calls, 3), launches[name] / calls] for name, ns in total_ns.most_common(NAMED)}
    return {"device_us": total_ns.total() / 1e3 / calls, "kernels": kernels}
