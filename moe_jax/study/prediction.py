"""Predicts throughput and latency of policies under load, with a load model fitted to measured tables."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import PredictConfig
from moe_jax.cost import roofline
from moe_jax.cost.roofline import Machine
from moe_jax.routing import policies
from moe_jax.study import expert_use, measured_table, simulation
from moe_jax.study.load_model import Constants, EvenDemand, LoadModel, Served, Workload, fit
from moe_jax.study.measured_table import MeasuredTable

LATENCIES = ("first_token", "per_token", "whole_request")
PERCENTS = (50, 90, 99)
_EDGE = 0.1  # share of the simulated requests, at the start and at the end, that latencies leave out


class Fit(NamedTuple):
    """A measured table beside a model that is fitted to one of its columns."""

    table: str
    column: str
    concurrency: tuple[int, ...]
    measured: dict[str, tuple[float, ...]]  # tokens per second of each column
    predicted: dict[str, tuple[float, ...]]
    constants: Constants

    @property
    def relative(self) -> dict[str, np.ndarray]:
        """Predicted over measured, less one, for each column."""
        return {name: np.divide(self.predicted[name], self.measured[name]) - 1 for name in self.measured}

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """The median and the largest relative error of each column, without signs."""
        return {name: (float(np.median(abs(one))), float(abs(one).max())) for name, one in self.relative.items()}

    @property
    def gain_errors(self) -> dict[str, float]:
        """The median difference between predicted and measured gain over the fitted column, for each column."""
        measured, predicted = (
            {name: np.divide(values, rates[self.column]) for name, values in rates.items()}
            for rates in (self.measured, self.predicted)
        )
        return {name: float(np.median(abs(predicted[name] - measured[name]))) for name in measured}


class Gain(NamedTuple):
    """A policy in a closed loop."""

    policy: str
    concurrency: int
    tokens_per_s: float
    gain: float  # over the full model, 0.1 is 10% more
    experts_per_token: float  # in a decode step, mean over MoE layers
    distinct_experts: float  # of a MoE layer in a decode step, mean


class Latency(NamedTuple):
    """A policy under open arrivals."""

    policy: str
    load: float  # arrivals, over what the full model serves in a closed loop of as many clients as there are rows
    variation: float
    requests_per_s: float
    seconds: dict[str, dict[int, float]]  # of `LATENCIES`, by `PERCENTS`


class Predicted(NamedTuple):
    """All that is predicted of one model."""

    subject: str  # model, machine and load, in words
    routing: str  # whose, in words
    constants: Constants
    reached: Machine
    saturating: dict[str, float]  # tokens of a step
    exchanged: dict[str, int]  # numbers per token and MoE layer
    fits: Sequence[Fit]
    gains: Sequence[Gain]
    latencies: Sequence[Latency]


def workload_of(config: PredictConfig) -> Workload:
    """The requests of a configuration."""
    return Workload(config.prompt_tokens, config.output_tokens, config.prefill_tokens)


def peak_of(config: PredictConfig) -> Machine:
    """The peaks of all devices together."""
    return Machine(config.devices * config.device_bytes_per_s, config.devices * config.device_flops_per_s)


def fit_table(table: MeasuredTable, name: str, column: str, architecture: Architecture, config: PredictConfig) -> Fit:
    """Fits a model to one column of a table, with experts chosen evenly, and predicts all columns.

    Raises:
        ValueError: there is no such column, the architecture cannot have what a column says, or the fit is impossible.
    """
    workload = workload_of(config)
    served = {}
    for other in table.tokens_per_s:
        changed = measured_table.architecture_of(other, architecture)
        served[other] = _served(changed, EvenDemand(changed), config)
    clients = table.concurrency.tolist()
    fitted = measured_table.column_of(table, column, "predict.columns")
    constants = fit(served[column], workload, clients, fitted, f"{name}, {column}")
    predicted = {
        other: tuple(LoadModel(one, constants).closed_loop(workload, rows) for rows in clients)
        for other, one in served.items()
    }
    measured = {other: tuple(values.tolist()) for other, values in table.tokens_per_s.items()}
    return Fit(pathlib.PurePath(name).stem, column, tuple(clients), measured, predicted, constants)


def _served(architecture: Architecture, demand, config: PredictConfig) -> Served:
    return Served(architecture, demand, peak_of(config), config.weight_bytes, config.cache_bytes)


def load_models(
    compared: Sequence[policies.Policy],
    recorded: expert_use.RecordedRouting,
    architecture: Architecture,
    constants: Constants,
    config: PredictConfig,
    advance: Callable[[], object],
) -> dict[str, LoadModel]:
    """The load model of each policy, by its spec: its use of experts is counted on recorded routing.

    Raises:
        ValueError: a policy does not fit the model.
    """
    found = {}
    for policy in compared:
        demand = expert_use.demand(policy, recorded, architecture, config.concurrencies)
        found[policy.spec] = LoadModel(_served(architecture, demand, config), constants)
        advance()
    return found


def gains(models: Mapping[str, LoadModel], config: PredictConfig) -> list[Gain]:
    """Every model in a closed loop at each concurrency; the first is the full model."""
    workload, found = workload_of(config), []
    for rows in sorted(config.concurrencies):
        full = next(iter(models.values())).closed_loop(workload, rows)
        for spec, model in models.items():
            kept, distinct = model.served.demand.decode(rows)
            layers = model.served.architecture.decoder.num_moe_layers
            rate = model.closed_loop(workload, rows)
            found.append(Gain(spec, rows, rate, rate / full - 1, kept / rows / layers, distinct / layers))
    return found


def latencies(
    models: Mapping[str, LoadModel], config: PredictConfig, seed: int, advance: Callable[[], object]
) -> list[Latency]:
    """Every model under open arrivals at each load and variation; the same arrivals for all of them."""
    workload, found = workload_of(config), []
    tokens = workload.prompt_tokens + workload.output_tokens
    capacity = next(iter(models.values())).closed_loop(workload, config.max_rows) / tokens
    prompt_J, output_J = (np.full(config.requests, one) for one in workload[:2])
    limits = simulation.Limits(config.max_rows, workload.prefill_tokens)
    for load in config.loads:
        for variation in config.variations:
            generator = np.random.default_rng(seed)
            arrival_J = simulation.arrivals(load * capacity, config.requests, variation, generator)
            requests = simulation.Requests(arrival_J, prompt_J, output_J)
            for spec, model in models.items():
                times = simulation.simulate(requests, model, limits)
                found.append(Latency(spec, load, variation, load * capacity, _percentiles(times, workload)))
                advance()
    return found


def _percentiles(times: simulation.Times, workload: Workload) -> dict[str, dict[int, float]]:
    edge = int(_EDGE * len(times.arrival_J))
    arrival_J, _, first_J, last_J = (values[edge : len(values) - edge] for values in times)
    each = (first_J - arrival_J, (last_J - first_J) / (workload.output_tokens - 1), last_J - arrival_J)
    return {
        name: dict(zip(PERCENTS, np.percentile(values, PERCENTS).tolist())) for name, values in zip(LATENCIES, each)
    }


def saturating(architecture: Architecture, config: PredictConfig) -> dict[str, float]:
    """Tokens of a step from which arithmetic takes longer: for one feed-forward, and for a layer of experts."""
    moe, d_model, peak = architecture.moe, architecture.decoder.d_model, peak_of(config)
    dense = roofline.saturating_tokens(peak, d_model, moe.k * moe.expert_hidden, config.weight_bytes)
    expert = roofline.saturating_tokens(peak, d_model, moe.expert_hidden, config.weight_bytes)
    return {"saturating_tokens_dense": dense, "saturating_tokens_experts": expert * moe.num_experts / moe.k}


def exchanged(architecture: Architecture, config: PredictConfig) -> dict[str, int]:
    """Numbers that devices exchange for one token and layer, split by experts (at most) and by tensors (at least)."""
    d_model = architecture.decoder.d_model
    by_expert = roofline.expert_parallel_elements(1, architecture.moe.k, d_model)
    by_tensor = roofline.tensor_parallel_elements(1, config.devices, d_model)
    return {"exchanged_by_experts": by_expert, "exchanged_by_tensors": by_tensor}
