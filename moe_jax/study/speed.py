"""Times the steps of a model and compares them with the roofline of the machine.

A case is a decode step of B rows, or a prefill of one row. Cases call the same programs as `Engine.run`, in the same
way: from arrays on the host to the sampled tokens on the host, with several short decode steps in one call. Every round
runs all cases in turn, so that a slow moment of the machine affects all of them.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from moe_jax.config.schema import SamplingConfig
from moe_jax.cost import roofline
from moe_jax.engine import cache as caches
from moe_jax.engine.batch import PaddedPrompts, pad_prompts
from moe_jax.engine.generate import Engine, steps_at_once
from moe_jax.engine.request import AnyPolicy, make_requests
from moe_jax.engine.steps import CacheSlots, Live
from moe_jax.model.decoder import Execution
from moe_jax.model.finite import require_finite
from moe_jax.routing.policies import Replayed
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True)
class TimedModel:
    """The model that is timed, and its settings.

    Attributes:
        engine: its weights and programs.
        execution: the static settings of the steps.
        policy: of every row.
        sampling: of every row.
        trace: routing to replay; None: the model routes.
        routing: whether samples record the expert of every slot.
    """

    engine: Engine
    execution: Execution
    policy: AnyPolicy
    sampling: SamplingConfig
    trace: Trace | None = None
    routing: bool = False

    def __post_init__(self):
        if self.trace is not None and len({*self.execution.architecture.num_experts_L}) > 1:
            raise ValueError("benchmark.trace is of layers that are alike: expected moe.num_experts_of_layers = ()")

    def batch(self, tokens_BT: np.ndarray, max_new_tokens: int) -> PaddedPrompts:
        """Turns rows of tokens into a batch of requests."""
        sampling = dataclasses.replace(self.sampling, max_new_tokens=max_new_tokens)
        prompts = tokens_BT.tolist()
        return pad_prompts(
            make_requests(prompts, None, self.execution, sampling=sampling, policy=self.policy), self.execution
        )

    def replayed(self, rows: int, length: int) -> np.ndarray | None:
        """expert_LBTK to replay for `rows` rows of `length` tokens; None without a trace."""
        if self.trace is None:
            return None
        architecture = self.execution.architecture
        layers, experts = architecture.decoder.num_moe_layers, architecture.moe.num_experts
        return self.trace.replay(layers, experts, self.execution.k_max, rows, length)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One step of a program."""

    seconds: float
    step: roofline.Step
    chosen_LNK: np.ndarray | None = None  # int32, -1: not kept; None unless `TimedModel.routing`


class Prefill:
    """A prefill: reads one row of tokens into a new cache and samples the next token."""

    def __init__(self, model: TimedModel, tokens_T: np.ndarray):
        self.name, self.rows, self.tokens = f"prefill_{len(tokens_T)}", 1, len(tokens_T)
        self._engine = model.engine
        batch = model.batch(tokens_T[None], 1)
        replayed_LBTK = model.replayed(1, self.tokens)
        self._batch = batch._replace(live=_with_replay(batch.live, replayed_LBTK, batch.tokens_BT.shape))
        self._program = model.engine.prefill_program(self._batch, model.execution, model.routing)
        _require_room(self._program, self.name)

    def take(self, most: int) -> list[Sample]:
        """Calls the program once, whatever `most` is."""
        batch, engine = self._batch, self._engine
        given = (batch.tokens_BT, batch.length_B, batch.budget_B, engine.end_I, batch.live)
        began = time.perf_counter()
        result, _ = self._program(engine.params, *given)
        result = jax.device_get(result)
        seconds = time.perf_counter() - began
        require_finite(result.log_probability_B[:1], f"a step of {self.name}", engine.params)
        step = roofline.Step([0], [self.tokens], int(result.kept_B.sum()), int(result.distinct))
        return [Sample(seconds, step, result.chosen_LNK)]


class Decode:
    """Decode steps: each reads one token of every row and samples the next.

    Args:
        model: what is timed.
        tokens_BT: the prompt of each row, then the token that each later step reads.
        prompt_length: tokens in the cache before the first step.
    """

    def __init__(self, model: TimedModel, tokens_BT: np.ndarray, prompt_length: int):
        self.rows, length = tokens_BT.shape
        self.name, self.tokens = f"decode_{self.rows}", self.rows
        self._engine, self._tokens_BT, self._place = model.engine, tokens_BT.astype(np.int32), prompt_length
        self._seconds = float("inf")  # per step, in the last call
        batch = model.batch(tokens_BT[:, :prompt_length], length - prompt_length)
        self._live, self._replayed_LBTK = batch.live, model.replayed(self.rows, length)
        prompt_LBTK = None if self._replayed_LBTK is None else self._replayed_LBTK[:, :, :prompt_length]
        reading = batch._replace(live=_with_replay(batch.live, prompt_LBTK, batch.tokens_BT.shape))
        _require_room(model.engine.prefill_program(reading, model.execution), self.name)
        _, self._slots = jax.block_until_ready(model.engine.prefill(reading, model.execution))
        live, execution = self._live_from(self._place), model.execution
        self._program = model.engine.decode_program(self._slots, live, execution, model.routing)
        _require_room(self._program, self.name)

    def take(self, most: int) -> list[Sample]:
        """Takes the next steps of every row in one call: as many as the engine would, at most `most`."""
        engine, place = self._engine, self._place
        count = min(most, steps_at_once(self._seconds, engine.most_steps), self._tokens_BT.shape[1] - place)
        alive_B = np.arange(len(self._slots.token_B)) < self.rows
        padding = (0, len(alive_B) - self.rows)
        token_B = np.pad(self._tokens_BT[:, place], padding)
        at = (token_B, np.full(len(alive_B), place, np.int32), np.where(alive_B, count, 0).astype(np.int32))
        slots = jax.block_until_ready(jax.device_put(CacheSlots(self._slots.cache, *at)))
        live, never_I = self._live_from(place), np.full_like(engine.end_I, -1)
        began = time.perf_counter()
        taken, self._slots = self._program(engine.params, slots, alive_B, np.int32(count), never_I, live)
        taken = jax.device_get(taken)
        self._seconds = (time.perf_counter() - began) / count
        require_finite(taken.log_probability_SB[:count, : self.rows], f"a step of {self.name}", engine.params)
        self._place += count
        samples = []
        for number in range(count):
            work = (int(taken.kept_SB[number].sum()), int(taken.distinct_S[number]))
            step = roofline.Step([place + number] * self.rows, [1] * self.rows, *work)
            chosen = None if taken.chosen_SLBK is None else taken.chosen_SLBK[number]
            samples.append(Sample(self._seconds, step, chosen))
        return samples

    def _live_from(self, place: int) -> Live:
        if self._replayed_LBTK is None:
            return self._live
        of_steps_LBSK = self._replayed_LBTK[:, :, place : place + self._engine.most_steps]
        of_steps_LSBK = np.moveaxis(of_steps_LBSK, 2, 1)  # one step after the other
        return _with_replay(self._live, of_steps_LSBK, (self._engine.most_steps, len(self._live.sampling.seed_B)))


def _with_replay(live: Live, expert_LXYK: np.ndarray | None, padded: tuple[int, int]) -> Live:
    """The live settings that make tokens take these experts; -1 in padding leaves the choice to the router."""
    if expert_LXYK is None:
        return live
    layers, *given, k_max = expert_LXYK.shape
    padding = ((0, 0), *((0, full - size) for full, size in zip(padded, given)), (0, 0))
    replay_LNK = np.pad(expert_LXYK, padding, constant_values=-1).reshape(layers, -1, k_max)
    return live._replace(policy=Replayed(live.policy, jax.device_put(replay_LNK).block_until_ready()))


def _require_room(program: jax.stages.Compiled, name: str) -> None:
    analysis = program.memory_analysis()
    needed_bytes = 0 if analysis is None else analysis.temp_size_in_bytes
    if needed_bytes > (free_bytes := caches.available_bytes()):
        raise ValueError(
            f"{name} needs {needed_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB available: expected fewer or shorter "
            "rows in benchmark.decode_batches and benchmark.prefill_lengths"
        )


@dataclasses.dataclass(frozen=True)
class Timing:
    """The timing of a case over all its samples.

    Attributes:
        case: its name, such as "decode_8".
        tokens: read by one step.
        quartiles_ms: first quartile, median and third quartile of the time of a step.
        bytes: the least that a step must move, median over the steps.
        flops: of a step, median over the steps.
        floor_ms: the roofline time of a step, median over the steps.
        distinct_experts: of one MoE layer in one step, mean.
        independent_experts: the mean to expect if each token chose as many experts uniformly and independently.
    """

    case: str
    tokens: int
    quartiles_ms: tuple[float, float, float]
    bytes: float
    flops: float
    floor_ms: float
    distinct_experts: float
    independent_experts: float

    @property
    def over_floor(self) -> float:
        """The median time over the floor."""
        return self.quartiles_ms[1] / self.floor_ms

    @property
    def tokens_per_s(self) -> float:
        """Tokens read per second at the median time."""
        return 1e3 * self.tokens / self.quartiles_ms[1]


def take_turns(cases: Sequence[Prefill | Decode], decode_steps: int, samples: dict[str, list[Sample]]) -> None:
    """Runs one round: every case in turn. Appends to `samples`.

    Args:
        cases: their programs have run before, so that they are warm.
        decode_steps: steps of each decode case in this round; a prefill runs once.
        samples: by name of the case; new ones are appended.
    """
    for case in cases:
        enough = len(samples[case.name]) + (decode_steps if isinstance(case, Decode) else 1)
        while len(samples[case.name]) < enough:
            samples[case.name] += case.take(enough - len(samples[case.name]))


def timing_of(
    case: Prefill | Decode, samples: Sequence[Sample], execution: Execution, machine: roofline.Machine, itemsize: int
) -> Timing:
    """Summarises the samples of a case, with their roofline times."""
    architecture = execution.architecture
    layers = architecture.decoder.num_moe_layers
    works = [roofline.work(architecture, sample.step, itemsize) for sample in samples]
    kept = statistics.mean(sample.step.kept_slots for sample in samples) / (layers * case.tokens)
    return Timing(
        case.name,
        case.tokens,
        tuple(1e3 * np.percentile([sample.seconds for sample in samples], (25, 50, 75))),
        statistics.median(work.bytes for work in works),
        statistics.median(work.flops for work in works),
        1e3 * statistics.median(roofline.floor_s(work, machine) for work in works),
        statistics.mean(sample.step.distinct_experts for sample in samples) / layers,
        statistics.mean(
            roofline.expected_distinct(experts, min(kept, experts), case.tokens)
            for experts in architecture.num_experts_L
        ),
    )


def profile(cases: Sequence[Prefill | Decode], folder: str | os.PathLike) -> None:
    """Profiles every case once. Perfetto opens the `*.json.gz` files in `folder`, XProf the `*.xplane.pb` files."""
    with jax.profiler.trace(os.fspath(folder), create_perfetto_trace=True):
        for number, case in enumerate(cases):
            with jax.profiler.StepTraceAnnotation(case.name, step_num=number):
                case.take(1)
