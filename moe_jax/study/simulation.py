"""Simulates a server that decodes its requests together: requests arrive, wait, are read, and are decoded step by step.

The server reads prompts before it decodes: while requests wait and rows are free, it reads the next ones, several at
once up to a number of tokens, and meanwhile nothing is decoded. Otherwise each step gives every row a token. Time
passes from event to event: steps between two events are summed in closed form, so a simulation costs a few operations
per request, however many tokens it has.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class StepTimes(Protocol):
    """How long the steps of a server take."""

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """Seconds to read prompts of these lengths together and to sample the first token of each."""
        ...

    def decode_s(self, rows: int) -> tuple[float, float]:
        """Seconds of a decode step of `rows` rows with empty caches, and per cached token of all rows."""
        ...


class Requests(NamedTuple):
    """What the clients of a server ask for."""

    arrival_J: np.ndarray  # seconds, ascending
    prompt_J: np.ndarray  # tokens
    output_J: np.ndarray  # tokens, at least 1


class Limits(NamedTuple):
    """What a server does at once."""

    rows: int  # requests that are read or decoded
    prefill_tokens: int  # of prompts that are read together; a longer prompt is read alone


class Times(NamedTuple):
    """When things happened to each request, in seconds."""

    arrival_J: np.ndarray
    started_J: np.ndarray  # its prompt began to be read
    first_J: np.ndarray  # its first token was there
    last_J: np.ndarray  # its last token was there


def arrivals(rate: float, count: int, variation: float, generator: np.random.Generator) -> np.ndarray:
    """arrival_J in seconds: independent gamma-distributed gaps.

    Args:
        rate: arrivals per second.
        count: of arrivals.
        variation: variance of a gap over its squared mean: 1 is a Poisson process, more is bursty.
        generator: of random numbers.
    """
    return np.cumsum(generator.gamma(1 / variation, variation / rate, count))


def simulate(requests: Requests, times: StepTimes, limits: Limits, clients: int = 0) -> Times:
    """Serves requests, first come, first served.

    Args:
        requests: in the order of their arrival.
        times: of steps.
        limits: of the server.
        clients: 0: requests arrive when they say. Otherwise a closed loop of this many clients: as many requests are
            there at the start, and another arrives whenever one is done, whatever `arrival_J` says.
    """
    count = len(requests.arrival_J)
    arrival_J = np.array(requests.arrival_J, float)
    if clients:
        arrival_J[:] = np.inf
        arrival_J[:clients] = 0.0
    started_J, first_J, last_J = (np.full(count, np.nan) for _ in range(3))
    prompt_J, output_J = requests.prompt_J.tolist(), requests.output_J.tolist()
    live: list[tuple[int, int]] = []  # a heap: the step after which a request is done, and its number
    now, step, cached, waiting, arrived = 0.0, 0, 0, 0, min(clients, count)

    def finish(number: int) -> None:
        nonlocal arrived
        last_J[number] = now
        if clients and arrived < count:
            arrival_J[arrived] = now
            arrived += 1

    while waiting < count or live:
        reading = _next_batch(arrival_J, prompt_J, waiting, now, limits, limits.rows - len(live))
        if reading:
            started_J[reading] = now
            now += times.prefill_s([prompt_J[number] for number in reading])
            first_J[reading] = now
            waiting = reading.stop
            for number in reading:
                if output_J[number] == 1:
                    finish(number)
                else:
                    heapq.heappush(live, (step + output_J[number] - 1, number))
                    cached += prompt_J[number]
            continue
        if not live:
            now = float(arrival_J[waiting])
            continue
        rows, steps = len(live), live[0][0] - step
        empty_s, per_token_s = times.decode_s(rows)
        first_s, growth_s = empty_s + per_token_s * cached, per_token_s * rows
        if rows < limits.rows and waiting < count:
            steps = min(steps, _steps_until(float(arrival_J[waiting]) - now, first_s, growth_s))
        now += _elapsed(steps, first_s, growth_s)
        step, cached = step + steps, cached + rows * steps
        while live and live[0][0] == step:
            _, number = heapq.heappop(live)
            cached -= prompt_J[number] + output_J[number] - 1
            finish(number)
    return Times(arrival_J, started_J, first_J, last_J)


def _next_batch(arrival_J, prompt_J: list[int], waiting: int, now: float, limits: Limits, free: int) -> range:
    """The requests that are read next; none if none waits, or no row is free."""
    end, tokens = waiting, 0
    while end < len(prompt_J) and end - waiting < free and arrival_J[end] <= now:
        tokens += prompt_J[end]
        if tokens > limits.prefill_tokens and end > waiting:
            break
        end += 1
    return range(waiting, end)


def _elapsed(steps: int, first_s: float, growth_s: float) -> float:
    """Seconds of successive steps, each of which takes `growth_s` longer than the one before."""
    return steps * first_s + growth_s * steps * (steps - 1) / 2


def _steps_until(gap_s: float, first_s: float, growth_s: float) -> float:
    """The fewest steps, at least one, that take `gap_s` or longer; infinity if that never comes."""
    if math.isinf(gap_s):
        return math.inf
    straight_s = first_s - growth_s / 2  # steps * straight_s + steps**2 * growth_s / 2 is the time of all
    root = math.sqrt(max(straight_s**2 + 2 * growth_s * gap_s, 0.0))
    steps = max(1, math.ceil(2 * gap_s / (straight_s + root)))
    while steps > 1 and _elapsed(steps - 1, first_s, growth_s) >= gap_s:
        steps -= 1
    while _elapsed(steps, first_s, growth_s) < gap_s:
        steps += 1
    return steps
