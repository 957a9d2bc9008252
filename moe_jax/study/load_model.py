"""A model of a server's steps, fitted to measured throughputs: how long a step takes, and what a closed loop delivers.

A step with R rows takes

    (bytes / peak bandwidth + operations / peak rate) / efficiency + step_s + row_s * R

Bytes and operations are the least that `cost/roofline.py` counts, and they add up, since kernels run one after another
and few of them overlap the two. Three constants are fitted, in one linear least-squares problem. The share of the peak
that is reached is one number for bandwidth and arithmetic, because one measured column cannot tell two: in a closed
loop, all operations of a request and all time per row are proportional to the concurrency.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.cost.roofline import Machine, Step, Work, expected_distinct, work


class ExpertDemand(Protocol):
    """The slots that tokens keep and the distinct experts that they touch, both summed over MoE layers."""

    def decode(self, rows: int) -> tuple[float, float]:
        """Kept slots, and distinct experts, of a decode step."""
        ...

    def prefill(self, tokens: int) -> tuple[float, float]:
        """Kept slots, and distinct experts, when this many tokens of prompts are read together."""
        ...


@dataclasses.dataclass(frozen=True)
class EvenDemand:
    """Tokens choose evenly and independently; every layer keeps the model's own k."""

    architecture: Architecture

    def decode(self, rows: int) -> tuple[float, float]:
        """See `ExpertDemand`."""
        return self.prefill(rows)

    def prefill(self, tokens: int) -> tuple[float, float]:
        """See `ExpertDemand`."""
        model = self.architecture
        distinct = sum(expected_distinct(experts, k, tokens) for experts, k in zip(model.num_experts_L, model.k_L))
        return float(tokens * sum(model.k_L)), distinct


class Workload(NamedTuple):
    """Requests, all alike, and how a server reads them."""

    prompt_tokens: int
    output_tokens: int  # at least 2
    prefill_tokens: int  # of prompts that are read together; a longer prompt is read alone


@dataclasses.dataclass(frozen=True)
class Served:
    """A model on a machine, with what its requests do with experts."""

    architecture: Architecture
    demand: ExpertDemand
    peak: Machine  # of all devices together, as their maker states it
    weight_bytes: int
    cache_bytes: int

    def decode_work(self, rows: int, cached: float) -> Work:
        """The least work of a decode step; `cached` tokens of all rows together are in the cache."""
        kept, distinct = self.demand.decode(rows)
        step = Step([cached / rows] * rows, [1] * rows, kept, distinct)
        return work(self.architecture, step, self.weight_bytes, self.cache_bytes)

    def prefill_work(self, prompts: Sequence[int]) -> Work:
        """The least work of reading prompts of these lengths together."""
        kept, distinct = self.demand.prefill(sum(prompts))
        step = Step([0] * len(prompts), prompts, kept, distinct)
        return work(self.architecture, step, self.weight_bytes, self.cache_bytes)

    def peak_s(self, done: Work) -> float:
        """Seconds of moving and of computing at the peaks, one after the other."""
        return done.bytes / self.peak.bytes_per_s + done.flops / self.peak.flops_per_s


class Constants(NamedTuple):
    """What is fitted."""

    efficiency: float  # share of the peak bandwidth, and of the peak rate, that is reached
    step_s: float  # of every step, whatever it does
    row_s: float  # of every row in a step

    def reached(self, peak: Machine) -> Machine:
        """The bandwidth and the rate of arithmetic that are reached."""
        return Machine(self.efficiency * peak.bytes_per_s, self.efficiency * peak.flops_per_s)


class Wave(NamedTuple):
    """All steps in which a closed loop serves one request of each client."""

    peak_s: float  # `Served.peak_s` of all
    steps: int
    rows: int  # summed over steps

    def seconds(self, constants: Constants) -> float:
        """The time that they take."""
        return self.peak_s / constants.efficiency + self.steps * constants.step_s + self.rows * constants.row_s


def wave(served: Served, workload: Workload, concurrency: int) -> Wave:
    """Clients whose requests are alike stay in step: all prompts are read, some at once, then all are decoded."""
    at_once = max(1, workload.prefill_tokens // workload.prompt_tokens)
    whole, rest = divmod(concurrency, at_once)
    reads = [at_once] * whole + [rest] * (rest > 0)
    read_s = {count: served.peak_s(served.prefill_work([workload.prompt_tokens] * count)) for count in {*reads}}
    decodes = workload.output_tokens - 1  # the first token comes from reading the prompt
    cached = workload.prompt_tokens + (decodes - 1) / 2  # of a row, on average: work is linear in it
    decode_s = served.peak_s(served.decode_work(concurrency, concurrency * cached))
    return Wave(
        sum(read_s[count] for count in reads) + decodes * decode_s,
        len(reads) + decodes,
        concurrency * workload.output_tokens,
    )


@dataclasses.dataclass(frozen=True)
class LoadModel:
    """The times of a server's steps; they are those of a `simulation.StepTimes`."""

    served: Served
    constants: Constants

    def closed_loop(self, workload: Workload, concurrency: int) -> float:
        """Tokens per second, prompts and outputs together, with as many requests always in service."""
        tokens = concurrency * (workload.prompt_tokens + workload.output_tokens)
        return tokens / wave(self.served, workload, concurrency).seconds(self.constants)

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """Seconds to read prompts of these lengths together."""
        return self._prefill_s(tuple(prompts))

    @functools.cached_property
    def _prefill_s(self):
        return functools.cache(lambda prompts: self._step_s(self.served.prefill_work(prompts), len(prompts)))

    def decode_s(self, rows: int) -> tuple[float, float]:
        """Seconds of a decode step of rows with empty caches, and per cached token of all rows."""
        return self._decode_s(rows)

    @functools.cached_property
    def _decode_s(self):
        @functools.cache
        def decode_s(rows: int) -> tuple[float, float]:
            empty_s, one_s = (self._step_s(self.served.decode_work(rows, cached), rows) for cached in (0, rows))
            return empty_s, (one_s - empty_s) / rows

        return decode_s

    def _step_s(self, done: Work, rows: int) -> float:
        return Wave(self.served.peak_s(done), 1, rows).seconds(self.constants)


def fit(
    served: Served, workload: Workload, concurrency: Sequence[int], tokens_per_s: Sequence[float], where: str
) -> Constants:
    """The constants with the least squares of relative errors of the time of a wave.

    Args:
        served: the model that was measured.
        workload: its requests.
        concurrency: of each measurement.
        tokens_per_s: of each measurement, prompts and outputs together.
        where: the measurements come from, for messages.

    Raises:
        ValueError: there are fewer than three, or no positive constants and efficiency of at most 1 explain them.
    """
    if len(concurrency) < 3:
        raise ValueError(f"{where}: expected three concurrencies or more, got {len(concurrency)}")
    waves = np.array([wave(served, workload, int(clients)) for clients in concurrency])
    tokens = np.asarray(concurrency) * (workload.prompt_tokens + workload.output_tokens)
    measured_s = tokens / np.asarray(tokens_per_s)
    inefficiency, step_s, row_s = np.linalg.lstsq(waves / measured_s[:, None], np.ones(len(waves)), rcond=None)[0]
    if inefficiency < 1 or step_s < 0 or row_s < 0:
        raise ValueError(
            f"{where}: the best fit reaches {1 / inefficiency:.2f} of the peak, with {1e3 * step_s:.3g} ms per step "
            f"and {1e3 * row_s:.3g} ms per row; expected at most 1, and times of at least 0: is it of this model and "
            "load, on predict.devices of predict.device_bytes_per_s and predict.device_flops_per_s?"
        )
    return Constants(float(1 / inefficiency), float(step_s), float(row_s))
