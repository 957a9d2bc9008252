"""Measures a frontier: every policy at every concurrency, quality on one model, speed on the same or another one."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import SweepConfig, side_by_side, steps_at
from moe_jax.cost import roofline
from moe_jax.engine.generate import Engine
from moe_jax.evaluation import concurrent
from moe_jax.evaluation.intervals import paired_ratio, ratio
from moe_jax.evaluation.journal import Journal
from moe_jax.model import parameters
from moe_jax.model.decoder import Params
from moe_jax.model.dtypes import dtype_of, expert_itemsize
from moe_jax.model.execution import Execution
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.routing.selection import distinct_experts
from moe_jax.study import frontier, speed, surgery

PRUNED = "pruned"  # begins the name of a model with fewer experts


class Candidate(NamedTuple):
    """A policy, and the model to measure it on."""

    policy: policies.Policy
    load: Callable[[], Params]  # called where its quality is not known yet
    execution: Execution
    pruned: str = ""  # name of the model if it has fewer experts than the swept one

    @property
    def name(self) -> str:
        """What tables and charts call it."""
        return f"{PRUNED}:{self.pruned}" if self.pruned else self.policy.spec


class TimedEngine(NamedTuple):
    """A model whose steps are timed."""

    engine: Engine
    execution: Execution


def parsed(config: SweepConfig, calibration: Calibration | None, execution: Execution) -> list[policies.Policy]:
    """The policies of a sweep, the full model first.

    Raises:
        ValueError: one does not parse, or does not fit the model.
    """
    compared = [parse(spec, calibration) for spec in config.policies]
    policies.settings(compared, execution.architecture, execution.k_max)
    return [MODEL_OWN, *(policy for policy in compared if policy.parts != MODEL_OWN.parts)]


def require_alike(other: Architecture, model: Architecture, setting: str) -> None:
    """Checks that another model has the same numbers of MoE layers and experts as the swept one.

    Raises:
        ValueError: it differs; the message names `setting`, which gave the other model.
    """
    for name, value, expected in (
        ("MoE layers", other.decoder.num_moe_layers, model.decoder.num_moe_layers),
        ("moe.num_experts", other.moe.num_experts, model.moe.num_experts),
        ("moe.num_experts_of_layers", other.num_experts_L, model.num_experts_L),
    ):
        if value != expected:
            raise ValueError(f"{setting}: {name} = {value}; expected {expected}, as in the model that is swept")


def require_pruned(pruned: Architecture, model: Architecture, setting: str) -> None:
    """Checks that a model has as many MoE layers as the swept one, none with more experts, and the same k.

    Raises:
        ValueError: it has not; the message names `setting`, which gave the model.
    """
    for name, value, expected in (
        ("MoE layers", pruned.decoder.num_moe_layers, model.decoder.num_moe_layers),
        ("moe.k", pruned.k_L, model.k_L),
    ):
        if value != expected:
            raise ValueError(f"{setting}: {name} = {value}; expected {expected}, as in the model that is swept")
    if any(own > most for own, most in zip(pruned.num_experts_L, model.num_experts_L)):
        raise ValueError(
            f"{setting}: moe.num_experts_of_layers = {pruned.num_experts_L}; expected at most {model.num_experts_L}, "
            "those of the model that is swept"
        )


def num_qualities(candidates: Sequence[Candidate], config: SweepConfig) -> int:
    """Number of times that `measure_quality` reads the windows."""
    return sum(len(config.concurrencies) if candidate.policy.batch_aware else 1 for candidate in candidates)


def measure_quality(
    candidates: Sequence[Candidate],
    windows: concurrent.Windows,
    config: SweepConfig,
    journal: Journal,
    advance: Callable[[], object],
) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """Measures every candidate on the windows: at every concurrency if its policy is batch-aware, else once.

    Returns:
        (candidate index, concurrency) -> `bits_J`, `kept_L`, `distinct`, and `chosen_SLBK`, the routing of timed steps.
    """
    qualities = {}
    for number, candidate in enumerate(candidates):
        batch_aware = candidate.policy.batch_aware
        reads = [[concurrency] for concurrency in config.concurrencies] if batch_aware else [list(config.concurrencies)]
        for at in reads:
            together = at[0] if batch_aware else 1

            def compute(candidate=candidate, at=at, together=together):
                read = candidate.load(), windows, candidate.policy, candidate.execution
                seen = concurrent.score_windows(*read, side_by_side(together), together)
                kept_L = (seen.chosen_LJTK >= 0).sum(axis=3).mean(axis=(1, 2))
                part = {"bits_J": seen.bits_J, "kept_L": kept_L}
                for concurrency in at:
                    part[f"distinct_{concurrency}"] = concurrent.distinct_at(seen.chosen_LJTK, concurrency)
                    count = config.rounds * steps_at(config, concurrency)
                    part[f"chosen_{concurrency}"] = concurrent.steps_of(seen.chosen_LJTK, concurrency, count)
                return part

            part = journal.once(f"quality-{number:02d}-{at[0]:04d}", compute)
            for concurrency in at:
                routed = {"distinct": part[f"distinct_{concurrency}"], "chosen_SLBK": part[f"chosen_{concurrency}"]}
                qualities[number, concurrency] = {"bits_J": part["bits_J"], "kept_L": part["kept_L"]} | routed
            advance()
    return qualities


def measure_speed(
    timed: TimedEngine,
    candidates: Sequence[Candidate],
    qualities: dict[tuple[int, int], dict[str, np.ndarray]],
    config: SweepConfig,
    journal: Journal,
    advance: Callable[[], object],
) -> dict[tuple[int, int], frontier.Speed]:
    """Times every policy at every concurrency, in rounds; the full model runs first and last in each round.

    The order of the others is random in each round, so that none always follows the same one. The routing of a pruned
    model is replayed over as many of the timed model's experts as it has: the others are not read.
    """
    params = timed.engine.params
    itemsizes = {"itemsize": dtype_of(params).itemsize, "expert_itemsize": expert_itemsize(params)}
    seconds = {concurrency: [] for concurrency in config.concurrencies}
    bytes_moved = {}

    @functools.cache
    def rows_of(concurrency: int) -> speed.Rows:
        return speed.Rows.of_zeros(timed.engine, timed.execution, concurrency, config.cached_tokens)

    def replay(number: int, rows: int, steps: slice) -> speed.Replay:
        chosen_SLBK = qualities[number, rows]["chosen_SLBK"][steps]
        return speed.Replay(rows_of(rows), config.cached_tokens, candidates[number].policy, chosen_SLBK)

    for turn in range(config.rounds):
        for rows in config.concurrencies:

            def compute(rows=rows, turn=turn):
                count = steps_at(config, rows)
                steps = slice(turn * count, (turn + 1) * count)
                others = np.random.default_rng((turn, rows)).permutation(np.arange(1, len(candidates)))
                order = [0, *others.tolist(), 0]
                cases = [replay(number, rows, steps) for number in order]
                taken = speed.take_turns(cases, [count] * len(cases))
                seconds_PS = np.array([[sample.seconds for sample in samples] for samples in taken])
                return {"seconds_PS": np.concatenate([seconds_PS[np.argsort(order[:-1])], seconds_PS[-1:]])}

            seconds[rows].append(journal.once(f"speed-{turn:02d}-{rows:04d}", compute)["seconds_PS"])
            advance()
    for at, quality in qualities.items():
        recorded = [speed.replayed_step(chosen_LBK, config.cached_tokens) for chosen_LBK in quality["chosen_SLBK"]]
        works = [roofline.work(timed.execution.architecture, step, **itemsizes) for step in recorded]
        bytes_moved[at] = float(np.mean([work.bytes for work in works]))
    return {
        (number, rows): _speed(np.stack(seconds[rows]), number, rows, bytes_moved[number, rows], quality)
        for (number, rows), quality in qualities.items()
    }


def _speed(seconds_RPS: np.ndarray, number: int, rows: int, bytes_moved: float, quality) -> frontier.Speed:
    quartiles_ms = np.percentile(1e3 * seconds_RPS[:, number], (25, 50, 75)).tolist()
    full_R = 1e3 * seconds_RPS[:, [0, -1]].mean(axis=(1, 2))
    round_R = 1e3 * seconds_RPS[:, number].mean(axis=1) if number else full_R
    distinct = np.mean([distinct_experts(chosen_LBK).mean() for chosen_LBK in quality["chosen_SLBK"]])
    return frontier.Speed(
        tuple(quartiles_ms),
        tuple(round_R.tolist()),
        1e3 * rows / quartiles_ms[1],
        frontier.gain(round_R, full_R),
        bytes_moved,
        float(distinct),
    )


def points(
    windows: concurrent.Windows,
    candidates: Sequence[Candidate],
    qualities: dict[tuple[int, int], dict[str, np.ndarray]],
    speeds: dict[tuple[int, int], frontier.Speed],
    timed: TimedEngine,
) -> list[frontier.Point]:
    """Joins quality and speed into points; intervals of quality resample documents."""
    _, document_J = np.unique(windows.document_J, return_inverse=True)
    sizes = np.bincount(document_J, windows.bytes_J)
    bits = {place: np.bincount(document_J, quality["bits_J"]) for place, quality in qualities.items()}
    uniform = [number for number, candidate in enumerate(candidates) if _is_uniform(candidate)]

    def rival(number: int, concurrency: int) -> frontier.Rival | None:
        distinct = qualities[number, concurrency]["distinct"] - 1e-9
        enough = [other for other in uniform if qualities[other, concurrency]["distinct"] >= distinct]
        if number in uniform or not enough:
            return None
        nearest = min(enough, key=lambda other: qualities[other, concurrency]["distinct"])
        difference = paired_ratio(bits[number, concurrency], bits[nearest, concurrency])
        return frontier.Rival(candidates[nearest].name, float(qualities[nearest, concurrency]["distinct"]), difference)

    return [
        frontier.Point(
            candidates[number].name,
            number in uniform,
            concurrency,
            frontier.Quality(
                ratio(bits[number, concurrency], sizes),
                paired_ratio(bits[number, concurrency], bits[0, concurrency]),
                float(quality["kept_L"].mean()),
                tuple(quality["kept_L"].tolist()),
                float(quality["distinct"]),
            ),
            speeds[number, concurrency],
            _weights_bytes(timed_as(candidates[number], timed.execution.architecture), timed.engine.params),
            rival(number, concurrency),
        )
        for (number, concurrency), quality in sorted(qualities.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _is_uniform(candidate: Candidate) -> bool:
    """Whether it keeps the same number of all the model's experts, everywhere and always."""
    return not candidate.pruned and policies.uniform_k(candidate.policy, candidate.execution.architecture) is not None


def _weights_bytes(architecture: Architecture, params: Params) -> int:
    """The bytes of a model's weights in the dtypes of `params`."""
    routed = parameters.count(architecture, parameters.is_routed)
    others = parameters.count(architecture) - routed
    return round(routed * expert_itemsize(params) + others * dtype_of(params).itemsize)


def timed_as(candidate: Candidate, timed: Architecture) -> Architecture:
    """The timed model's shape, with as many experts in each layer as the candidate's model has.

    Raises:
        ValueError: the timed model cannot have these numbers.
    """
    return surgery.with_experts(timed, candidate.execution.architecture.num_experts_L)
