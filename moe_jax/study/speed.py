"""How long the steps of a model take, and how far that is from the least that the machine needs for them.

A case is a decode step of so many rows, or a prefill of one row. Cases call the programs that `Engine.run` calls, as it
calls them: from arrays on the host to the drawn tokens on the host. All cases have their turn in every round, so that a
slow moment of the machine falls on all of them.
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
from moe_jax.engine.generate import Batch, Engine, batch_of
from moe_jax.engine.request import AnyPolicy, make_requests
from moe_jax.engine.steps import Live
from moe_jax.model.decoder import Execution
from moe_jax.model.finite import require_finite
from moe_jax.routing.policies import Replayed
from moe_jax.routing.selection import distinct_experts
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is timed, and how it runs.

    Attributes:
        engine: its weights and programs.
        execution: the static half of the steps.
        policy: of every row.
        sampling: of every row.
        trace: routing to replay; None: the model's own.
    """

    engine: Engine
    execution: Execution
    policy: AnyPolicy
    sampling: SamplingConfig
    trace: Trace | None = None

    def batch(self, tokens_BT: np.ndarray, max_new_tokens: int) -> Batch:
        """Rows as a batch of requests."""
        sampling = dataclasses.replace(self.sampling, max_new_tokens=max_new_tokens)
        prompts = tokens_BT.tolist()
        return batch_of(
            make_requests(prompts, None, self.execution, sampling=sampling, policy=self.policy), self.execution
        )

    def replayed(self, rows: int, length: int) -> np.ndarray | None:
        """expert_LBTK of rows of that many tokens; None: the model's own choice."""
        if self.trace is None:
            return None
        architecture = self.execution.architecture
        layers, experts = architecture.decoder.num_moe_layers, architecture.moe.num_experts
        return self.trace.replay(layers, experts, self.execution.k_max, rows, length)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of a program."""

    seconds: float
    step: roofline.Step


class Prefill:
    """Reads one row of tokens into a new cache, and draws the next."""

    def __init__(self, subject: Subject, tokens_T: np.ndarray):
        self.name, self.rows, self.tokens = f"prefill_{len(tokens_T)}", 1, len(tokens_T)
        self._params = subject.engine.params
        batch = subject.batch(tokens_T[None], 1)
        self._batch = batch._replace(live=_with_replay(batch, subject.replayed(1, self.tokens)))
        self._program = subject.engine.prefill_program(self._batch, subject.execution)
        _require_room(self._program, self.name)

    def step(self) -> Sample:
        """Calls the program once."""
        batch = self._batch
        began = time.perf_counter()
        drawn, _ = self._program(self._params, batch.tokens_BT, batch.length_B, batch.valid_BT, batch.live)
        drawn = jax.device_get(drawn)
        seconds = time.perf_counter() - began
        require_finite(drawn.log_probability_B[:1], f"a step of {self.name}", self._params)
        return Sample(seconds, _step_of([0], [self.tokens], drawn.chosen_LNK))


class Decode:
    """Reads one token of every row, from texts that are given, and draws the next.

    Args:
        subject: what is timed.
        tokens_BT: the texts: a prompt, and a token for each step that will be taken.
        prompt_length: tokens that are in the cache before the first step.
    """

    def __init__(self, subject: Subject, tokens_BT: np.ndarray, prompt_length: int):
        self.rows, length = tokens_BT.shape
        self.name, self.tokens = f"decode_{self.rows}", self.rows
        self._params, self._tokens_BT, self._place = subject.engine.params, tokens_BT.astype(np.int32), prompt_length
        batch = subject.batch(tokens_BT[:, :prompt_length], length - prompt_length)
        self._replayed_LBTK = subject.replayed(self.rows, length)
        prompt_LBTK = None if self._replayed_LBTK is None else self._replayed_LBTK[:, :, :prompt_length]
        reading = batch._replace(live=_with_replay(batch, prompt_LBTK))
        prefill = subject.engine.prefill_program(reading, subject.execution)
        _require_room(prefill, self.name)
        arguments = (self._params, batch.tokens_BT, batch.length_B, batch.valid_BT, reading.live)
        _, self._cache = jax.block_until_ready(prefill(*arguments))
        self._batch = batch
        self._program = subject.engine.decode_program(batch._replace(live=self._live()), subject.execution)
        _require_room(self._program, self.name)

    def step(self) -> Sample:
        """Takes the next step of every row."""
        alive_B, padding = self._batch.valid_BT[:, 0], (0, self._batch.shape.batch - self.rows)
        token_B = np.pad(self._tokens_BT[:, self._place], padding)
        position_B = np.full(len(alive_B), self._place, np.int32)
        live = self._live()
        began = time.perf_counter()
        drawn, self._cache = self._program(self._params, self._cache, token_B, position_B, alive_B, live)
        drawn = jax.device_get(drawn)
        seconds = time.perf_counter() - began
        require_finite(drawn.log_probability_B[: self.rows], f"a step of {self.name}", self._params)
        step = _step_of([self._place] * self.rows, [1] * self.rows, drawn.chosen_LNK)
        self._place += 1
        return Sample(seconds, step)

    def _live(self) -> Live:
        if self._replayed_LBTK is None:
            return self._batch.live
        return _with_replay(self._batch, self._replayed_LBTK[:, :, self._place : self._place + 1])


def _with_replay(batch: Batch, expert_LBTK: np.ndarray | None) -> Live:
    """The live settings of a step whose tokens take these experts; padding is left to the router, and not valid."""
    if expert_LBTK is None:
        return batch.live
    layers, rows, length, k_max = expert_LBTK.shape
    padded_length = 1 if length == 1 else batch.shape.length
    padding = ((0, 0), (0, batch.shape.batch - rows), (0, padded_length - length), (0, 0))
    replay_LNK = np.pad(expert_LBTK, padding, constant_values=-1).reshape(layers, -1, k_max)
    replayed = Replayed(batch.live.policy, jax.device_put(replay_LNK).block_until_ready())
    return batch.live._replace(policy=replayed)


def _step_of(cached_B: Sequence[int], new_B: Sequence[int], chosen_LNK: np.ndarray) -> roofline.Step:
    kept = int(np.count_nonzero(chosen_LNK >= 0))
    return roofline.Step(cached_B, new_B, kept, int(distinct_experts(chosen_LNK).sum()))


def _require_room(program: jax.stages.Compiled, name: str) -> None:
    analysis = program.memory_analysis()
    needed_bytes = 0 if analysis is None else analysis.temp_size_in_bytes
    if needed_bytes > (free_bytes := caches.available_bytes()):
        raise ValueError(
            f"{name} needs {needed_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB available: wanted fewer or shorter "
            "rows in benchmark.decode_batches and benchmark.prefill_lengths"
        )


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a case took, over all its samples.

    Attributes:
        case: its name, such as "decode_8".
        tokens: that one step reads.
        quartiles_ms: the first, the median and the third.
        bytes: the least to be moved, median over the steps.
        flops: median over the steps.
        floor_ms: median over the steps.
        distinct_experts: of one MoE layer in one step, mean.
        independent_experts: the same, were each token to choose as many evenly and by itself.
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
        """Read by steps of the median time."""
        return 1e3 * self.tokens / self.quartiles_ms[1]


def take_turns(cases: Sequence[Prefill | Decode], decode_steps: int, samples: dict[str, list[Sample]]) -> None:
    """Gives every case its turn in one round, and adds what it took to the samples of its name.

    Args:
        cases: whose programs have run before, so that they are warm.
        decode_steps: of a decode case in its turn; a prefill has one.
        samples: by name of the case, added to.
    """
    for case in cases:
        for _ in range(decode_steps if isinstance(case, Decode) else 1):
            samples[case.name].append(case.step())


def timing_of(
    case: Prefill | Decode, samples: Sequence[Sample], execution: Execution, machine: roofline.Machine, itemsize: int
) -> Timing:
    """Sets the samples of a case beside their floors."""
    architecture = execution.architecture
    layers, experts = architecture.decoder.num_moe_layers, architecture.moe.num_experts
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
        roofline.expected_distinct(experts, kept, case.tokens),
    )


def profile(cases: Sequence[Prefill | Decode], folder: str | os.PathLike) -> None:
    """Runs every case once under the profiler, whose files Perfetto (`*.json.gz`) and XProf (`*.xplane.pb`) open."""
    with jax.profiler.trace(os.fspath(folder), create_perfetto_trace=True):
        for number, case in enumerate(cases):
            with jax.profiler.StepTraceAnnotation(case.name, step_num=number):
                case.step()
