"""Times the steps of a model.

A case is a prefill of one row, decode steps of B rows, or decode steps of B rows with recorded routing. Cases call the
same programs as `Engine.run`, in the same way: from arrays on the host to the drawn tokens on the host, with several
short decode steps in one call. In every round the cases take turns.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np

from moe_jax import memory
from moe_jax.config.schema import SamplingConfig
from moe_jax.cost import roofline
from moe_jax.engine import cache as caches
from moe_jax.engine.batch import PaddedPrompts, live_of, pad_prompts
from moe_jax.engine.generate import Engine, steps_at_once
from moe_jax.engine.request import AnyPolicy, make_requests
from moe_jax.engine.steps import CacheSlots, DecodeResult, Live
from moe_jax.model.dtypes import dtype_of
from moe_jax.model.execution import Execution
from moe_jax.model.finite import require_finite
from moe_jax.routing import policies
from moe_jax.routing.policies import Replayed
from moe_jax.routing.selection import distinct_experts
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True)
class TimedModel:
    """The model that is timed, and its settings.

    Attributes:
        engine: its weights and programs.
        execution: the static settings of the steps.
        policy: the policy of every row.
        sampling: sampling settings of every row.
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
    chosen_LNK: np.ndarray | None = None  # int32, -1: not kept; None unless the model asks for it


class Prefill:
    """A prefill: reads one row of tokens into a new cache and draws the next token."""

    def __init__(self, model: TimedModel, tokens_T: np.ndarray):
        self.name, self.tokens = f"prefill_{len(tokens_T)}", len(tokens_T)
        self._engine = model.engine
        batch = model.batch(tokens_T[None], 1)
        replayed_LBTK = model.replayed(1, self.tokens)
        self._batch = batch._replace(live=_with_replay(batch.live, replayed_LBTK, batch.tokens_BT.shape))
        self._program = model.engine.prefill_program(self._batch, model.execution, model.routing)
        _require_room(self._program, self.name)

    def take(self, most: int) -> list[Sample]:
        """Calls the program once, whatever `most` is."""
        batch, engine = self._batch, self._engine
        arguments = (batch.tokens_BT, batch.length_B, batch.budget_B, engine.end_I, batch.live)
        began = time.perf_counter()
        drawn, _ = self._program(engine.params, *arguments)
        drawn = jax.device_get(drawn)
        seconds = time.perf_counter() - began
        require_finite(drawn.log_probability_B[:1], f"a step of {self.name}", engine.params)
        step = roofline.Step([0], [self.tokens], int(drawn.kept_B.sum()), int(drawn.distinct))
        return [Sample(seconds, step, drawn.chosen_LNK)]


class Rows:
    """Rows that are decoded together, each with the same number of tokens in the cache.

    Args:
        engine: weights and programs.
        execution: the static settings of the steps.
        rows: their number B.
        slots: of the engine, with room for the rows.
        routing: whether samples record the expert of every slot.
    """

    def __init__(self, engine: Engine, execution: Execution, rows: int, slots: CacheSlots, routing: bool = False):
        self.count, self.engine, self.execution = rows, engine, execution
        self._slots, self._routing = slots, routing
        self._warm: set[jax.stages.Compiled] = set()

    @classmethod
    def of_zeros(
        cls, engine: Engine, execution: Execution, rows: int, cached: int, steps: int = 1, abstract: bool = False
    ) -> Self:
        """Rows with zeros in the cache, and room for `steps` steps after `cached` tokens.

        Abstract ones take no memory; programs can be compiled for them.

        Raises:
            ValueError: the cache does not fit in the memory that is available.
        """
        shape = caches.shape_of([cached] * rows, [steps + 1] * rows, execution.architecture.decoder.max_context)
        if abstract:
            shapes = jax.eval_shape(lambda: engine.empty(shape.batch, shape.memory, execution))
            return cls(engine, execution, rows, shapes)
        caches.require_memory(
            execution.architecture,
            [(shape.batch, shape.memory)],
            dtype_of(engine.params),
            None,
            execution.channel_multiple,
        )
        return cls(engine, execution, rows, engine.empty(shape.batch, shape.memory, execution))

    @property
    def padded(self) -> int:
        """The number of rows with padding."""
        return self._slots.token_B.shape[0]

    def program(self, live: Live) -> jax.stages.Compiled:
        """The program of a call with these settings."""
        return self.engine.decode_program(self._slots, live, self.execution, self._routing)

    def decode(self, name: str, token_B: np.ndarray, place: int, count: int, live: Live) -> list[Sample]:
        """Takes `count` steps in one call, after one that is not timed if the program has not run before.

        Args:
            name: of what is timed, for messages.
            token_B: that the first step reads; later ones read what was drawn.
            place: the position of these tokens.
            count: at most the engine's `most_steps`.
            live: settings of all slots.
        """
        program = self.program(live)
        if program not in self._warm:
            _require_room(program, name)
            self._call(program, token_B, place, 1, live)
            self._warm.add(program)
        seconds, taken = self._call(program, token_B, place, count, live)
        require_finite(taken.log_probability_SB[:count, : self.count], f"a step of {name}", self.engine.params)
        samples = []
        for number in range(count):
            work = (int(taken.kept_SB[number].sum()), int(taken.distinct_S[number]))
            step = roofline.Step([place + number] * self.count, [1] * self.count, *work)
            samples.append(Sample(seconds, step, None if taken.chosen_SLBK is None else taken.chosen_SLBK[number]))
        return samples

    def _call(
        self, program: jax.stages.Compiled, token_B: np.ndarray, place: int, count: int, live: Live
    ) -> tuple[float, DecodeResult]:
        """The seconds of each step, from arrays on the host to arrays on the host."""
        alive_B, never_I = np.arange(self.padded) < self.count, np.full_like(self.engine.end_I, -1)
        left_B = np.where(alive_B, count, 0).astype(np.int32)
        at = (np.pad(token_B, (0, self.padded - self.count)), np.full(self.padded, place, np.int32), left_B)
        slots = jax.block_until_ready(jax.device_put(CacheSlots(self._slots.cache, *at)))
        began = time.perf_counter()
        taken, self._slots = program(self.engine.params, slots, alive_B, np.int32(count), never_I, live)
        taken = jax.device_get(taken)
        return (time.perf_counter() - began) / count, taken


class Decode:
    """Decode steps: each reads one token of every row and draws the next.

    Args:
        model: what is timed.
        tokens_BT: the prompt of each row, then the token that each later step reads.
        prompt_length: tokens in the cache before the first step.
    """

    def __init__(self, model: TimedModel, tokens_BT: np.ndarray, prompt_length: int):
        rows, length = tokens_BT.shape
        self.name, self.tokens = f"decode_{rows}", rows
        self._engine, self._tokens_BT, self._place = model.engine, tokens_BT.astype(np.int32), prompt_length
        self._seconds = float("inf")  # per step, in the last call
        batch = model.batch(tokens_BT[:, :prompt_length], length - prompt_length)
        self._live, self._replayed_LBTK = batch.live, model.replayed(rows, length)
        prompt_LBTK = None if self._replayed_LBTK is None else self._replayed_LBTK[:, :, :prompt_length]
        reading = batch._replace(live=_with_replay(batch.live, prompt_LBTK, batch.tokens_BT.shape))
        _require_room(model.engine.prefill_program(reading, model.execution), self.name)
        _, slots = jax.block_until_ready(model.engine.prefill(reading, model.execution))
        self._rows = Rows(model.engine, model.execution, rows, slots, model.routing)

    def take(self, most: int) -> list[Sample]:
        """Takes the next steps of every row in one call: as many as the engine would, at most `most`."""
        place = self._place
        count = min(most, steps_at_once(self._seconds, self._engine.most_steps), self._tokens_BT.shape[1] - place)
        samples = self._rows.decode(self.name, self._tokens_BT[:, place], place, count, self._live_from(place))
        self._seconds, self._place = samples[0].seconds, place + count
        return samples

    def _live_from(self, place: int) -> Live:
        if self._replayed_LBTK is None:
            return self._live
        taken_LBSK = self._replayed_LBTK[:, :, place : place + self._engine.most_steps]
        taken_LSBK = np.moveaxis(taken_LBSK, 2, 1)  # one step after the other
        return _with_replay(self._live, taken_LSBK, (self._engine.most_steps, self._rows.padded))


class Replay:
    """Decode steps from one position on under a policy, each with recorded experts.

    The router and the policy run too, but their choice is not used. Every call overwrites the same entries of the
    cache. What the cache holds does not affect the time, so several policies take turns on the same rows.

    Args:
        rows: that are decoded, with room for the steps of a call.
        cached: tokens of each row in the cache.
        policy: of every row.
        chosen_SLBK: the experts of each step; -1: none.
        at_once: steps of a call; S is a multiple.
    """

    def __init__(self, rows: Rows, cached: int, policy: policies.Policy, chosen_SLBK: np.ndarray, at_once: int = 1):
        self.name, self.tokens = f"{rows.count} rows, {policy.spec!r}", rows.count
        self._rows, self._cached = rows, cached
        self._calls, self._done = np.split(chosen_SLBK, len(chosen_SLBK) // at_once), 0
        sampling = SamplingConfig(max_new_tokens=2)
        requests = make_requests([[0]], None, rows.execution, sampling=sampling, policy=policy)
        self._live = live_of(requests, rows.padded, rows.execution)

    def take(self, most: int) -> list[Sample]:
        """Takes the steps of the next call, whatever `most` is."""
        chosen_SLBK = self._calls[self._done]
        self._done += 1
        live = self._live_with(chosen_SLBK)
        return self._rows.decode(self.name, np.zeros(self._rows.count, np.int32), self._cached, len(chosen_SLBK), live)

    def compile(self) -> None:
        """Compiles the program of all calls; otherwise the first one does."""
        self._rows.program(self._live_with(self._calls[0]))

    def _live_with(self, chosen_SLBK: np.ndarray) -> Live:
        steps, layers, count, slots = chosen_SLBK.shape
        padded_LSBK = np.full((layers, steps, self._rows.padded, self._rows.execution.k_max), -1, np.int32)
        padded_LSBK[:, :, :count, :slots] = np.moveaxis(chosen_SLBK, 0, 1)
        padded_LNK = padded_LSBK.reshape(layers, -1, padded_LSBK.shape[3])  # one step after the other
        expert_and_keep = jax.device_put((np.maximum(padded_LNK, 0), padded_LNK >= 0))
        return self._live._replace(policy=Replayed(self._live.policy, *jax.block_until_ready(expert_and_keep)))


def replayed_step(chosen_LBK: np.ndarray, cached: int) -> roofline.Step:
    """The work of a step of `Replay`."""
    rows, kept = chosen_LBK.shape[1], int(np.count_nonzero(chosen_LBK >= 0))
    return roofline.Step([cached] * rows, [1] * rows, kept, int(distinct_experts(chosen_LBK).sum()))


def _with_replay(live: Live, expert_LXYK: np.ndarray | None, padded: tuple[int, int]) -> Live:
    """The live settings that make tokens take these experts; -1 in padding leaves the choice to the router."""
    if expert_LXYK is None:
        return live
    layers, *sizes, k_max = expert_LXYK.shape
    padding = ((0, 0), *((0, full - size) for full, size in zip(padded, sizes)), (0, 0))
    replay_LNK = np.pad(expert_LXYK, padding, constant_values=-1).reshape(layers, -1, k_max)
    return live._replace(policy=Replayed(live.policy, jax.device_put(replay_LNK).block_until_ready()))


def _require_room(program: jax.stages.Compiled, name: str) -> None:
    analysis = program.memory_analysis()
    needed_bytes = 0 if analysis is None else analysis.temp_size_in_bytes
    remedy = "fewer or shorter rows in benchmark.decode_batches, benchmark.prefill_lengths or sweep.concurrencies"
    memory.require(name, needed_bytes, memory.device_bytes(), remedy)


Case = Prefill | Decode | Replay


def take_turns(cases: Sequence[Case], steps: Sequence[int]) -> list[list[Sample]]:
    """Runs one round: every case in turn, for its number of steps. A slow moment of the machine affects all of them."""
    taken = []
    for case, count in zip(cases, steps, strict=True):
        samples = []
        while len(samples) < count:
            samples += case.take(count - len(samples))
        taken.append(samples)
    return taken


def profile(cases: Sequence[Case], folder: str | os.PathLike) -> None:
    """Profiles every case once. Perfetto opens the `*.json.gz` files in `folder`, XProf the `*.xplane.pb` files."""
    with jax.profiler.trace(os.fspath(folder), create_perfetto_trace=True):
        for number, case in enumerate(cases):
            with jax.profiler.StepTraceAnnotation(case.name, step_num=number):
                case.take(1)
