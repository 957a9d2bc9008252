"""The simulation against a loop that takes every step, against queueing theory, and in the limit of a closed loop."""

import math

import numpy as np
import pytest

from moe_jax.study import simulation
from moe_jax.study.simulation import Limits, Requests


class Linear:
    """Step times that are linear in everything."""

    def __init__(self, token_s=0.0, step_s=0.0, row_s=0.0, cached_s=0.0):
        self.token_s, self.step_s, self.row_s, self.cached_s = token_s, step_s, row_s, cached_s

    def prefill_s(self, prompts):
        return self.token_s * sum(prompts)

    def decode_s(self, rows):
        return self.step_s + self.row_s * rows, self.cached_s


def step_by_step(requests, times, limits):
    """Seconds of the first and the last token of each request, one step at a time, without a heap or closed forms."""
    now, waiting, live = 0.0, list(range(len(requests.arrival_J))), {}
    first, last = {}, {}
    while waiting or live:
        batch = []
        for number in waiting:
            tokens = sum(requests.prompt_J[other] for other in [*batch, number])
            room = len(live) + len(batch) < limits.rows and (not batch or tokens <= limits.prefill_tokens)
            if requests.arrival_J[number] > now or not room:
                break
            batch.append(number)
        if batch:
            waiting = waiting[len(batch) :]
            now += times.prefill_s([requests.prompt_J[number] for number in batch])
            for number in batch:
                first[number] = last[number] = now
                live[number] = 1
        elif live:
            empty_s, cached_s = times.decode_s(len(live))
            now += empty_s + cached_s * sum(requests.prompt_J[number] + live[number] - 1 for number in live)
            for number in live:
                live[number] += 1
                last[number] = now
        else:
            now = requests.arrival_J[waiting[0]]
        live = {number: had for number, had in live.items() if had < requests.output_J[number]}
    return [first[number] for number in sorted(first)], [last[number] for number in sorted(last)]


@pytest.mark.parametrize("seed", range(6))
def test_closed_forms_are_the_sums_of_single_steps(seed):
    random = np.random.default_rng(seed)
    arrival_J = simulation.arrivals(0.4, 60, (1.0, 6.0)[seed % 2], random)
    requests = Requests(arrival_J, random.integers(1, 50, 60), random.integers(1, 40, 60))
    times = Linear(0.01, 0.05, 0.01, 1e-4 * (seed % 3))
    limits = Limits((1, 3, 8)[seed % 3], (10, 100)[seed % 2])
    found = simulation.simulate(requests, times, limits)
    first, last = step_by_step(requests, times, limits)
    np.testing.assert_allclose(found.first_J, first, rtol=1e-9)
    np.testing.assert_allclose(found.last_J, last, rtol=1e-9)
    assert (found.started_J >= found.arrival_J).all() and (found.last_J >= found.first_J).all()


COUNT, RATE = 150_000, 0.5
ONE = Limits(1, 1)


def mean_wait(requests, times):
    found = simulation.simulate(requests, times, ONE)
    return float((found.started_J - found.arrival_J)[COUNT // 20 :].mean())


def arriving(variation, seed=0):
    return simulation.arrivals(RATE, COUNT, variation, np.random.default_rng(seed))


def test_equal_requests_one_at_a_time_wait_as_pollaczek_and_khinchine_say():
    """M/D/1: a request takes a second, half of it to read a prompt and half in ten further steps."""
    requests = Requests(arriving(1.0), np.full(COUNT, 5), np.full(COUNT, 11))
    assert mean_wait(requests, Linear(token_s=0.1, step_s=0.05)) == pytest.approx(RATE / (2 * (1 - RATE)), rel=0.03)


def exponential_prompts():
    return np.random.default_rng(1).exponential(1e6, COUNT).astype(int) + 1


@pytest.mark.parametrize("variation", [1.0, 3.0])
def test_exponential_requests_one_at_a_time_wait_as_theory_says(variation):
    """G/M/1 with a mean service of a second: the wait is s / (1 - s), where s solves s = A(1 - s).

    A is the Laplace transform of the time between arrivals. For a Poisson process s = rate, which is M/M/1.
    """
    share = 0.5
    for _ in range(1000):
        share = (1 + (1 - share) * variation / RATE) ** (-1 / variation)
    assert variation != 1 or share == pytest.approx(RATE)
    requests = Requests(arriving(variation), exponential_prompts(), np.ones(COUNT, int))
    assert mean_wait(requests, Linear(token_s=1e-6)) == pytest.approx(share / (1 - share), rel=0.03)


def test_several_rows_share_steps():
    """Two requests at once, of two tokens of prompt and three tokens of output, by hand."""
    requests = Requests(np.array([0.0, 0.0, 0.1]), np.array([2, 2, 2]), np.array([3, 3, 3]))
    found = simulation.simulate(requests, Linear(1.0, 10.0, 1.0, 0.5), Limits(2, 4))
    steps_s = [10 + 2 + 0.5 * 4, 10 + 2 + 0.5 * 6]
    np.testing.assert_allclose(found.last_J[:2], 4 + sum(steps_s))
    alone = [10 + 1 + 0.5 * 2, 10 + 1 + 0.5 * 3]
    np.testing.assert_allclose(found.started_J[2], found.last_J[0])
    np.testing.assert_allclose(found.last_J[2], found.started_J[2] + 2 + sum(alone))


@pytest.mark.parametrize("variation", [1.0, 5.0])
def test_gaps_between_arrivals_have_their_mean_and_variance(variation):
    gaps = np.diff(arriving(variation))
    assert gaps.mean() == pytest.approx(1 / RATE, rel=0.02)
    assert gaps.var() == pytest.approx(variation / RATE**2, rel=0.05)


def test_clients_ask_again_when_they_are_served():
    requests = Requests(np.zeros(50), np.full(50, 3), np.random.default_rng(0).integers(1, 9, 50))
    found = simulation.simulate(requests, Linear(0.1, 1.0), Limits(4, 100), clients=4)
    assert sorted(found.arrival_J[4:]) == sorted(found.last_J)[:46]
    in_service = [((found.arrival_J <= time) & (found.last_J > time)).sum() for time in found.arrival_J[4:-4]]
    assert set(in_service) == {4} and math.isfinite(found.last_J.max())
