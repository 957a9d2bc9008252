"""Generation: turns requests, each with its own policy and sampling, into completions."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from moe_jax.engine import cache as caches
from moe_jax.engine import steps
from moe_jax.engine.batch import Grouping, PaddedPrompts, group_by_length, live_of, pad_prompts
from moe_jax.engine.completion import Completion, RunningRequest
from moe_jax.engine.request import Request
from moe_jax.engine.steps import CacheSlots, DecodeResult, Live, PrefillResult
from moe_jax.model import decoder, formats
from moe_jax.model.finite import NotFiniteError, require_finite
from moe_jax.model.sharding import on_all

MOST_STEPS = 32  # in one call
STEPS_OF_SEVERAL = 8  # in one call, if several processes run
CALL_S = 0.05  # target time of a call of several steps: between calls, text is shown and Ctrl-C handled


@dataclasses.dataclass
class GenerationMetrics:
    """Time and work of a batch, without compiling and loading. Padding and finished rows are not counted."""

    prefill_tokens: int
    prefill_s: float = 0.0  # until the first token of every request is on the host
    decode_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0  # sampled by decode steps
    kept_slots: int = 0  # summed over decode steps, mean over MoE layers
    distinct_experts: float = 0.0  # experts with at least one row, summed and averaged likewise
    overflow: int | None = None  # kept slots that were not computed, of all layers and steps; None: none can be

    def add_step(self, tokens: int, kept: float, distinct: float) -> None:
        """Counts one decode step: tokens sampled, and its kept slots and distinct experts, means over MoE layers."""
        self.decode_steps += 1
        self.decode_tokens += tokens
        self.kept_slots += kept
        self.distinct_experts += distinct

    def figures(self) -> dict[str, dict[str, float | str]]:
        """The figures of result.json; those of decoding are NaN without a decode step."""
        decoded = {
            "decode_tokens_per_s": (self.decode_tokens, self.decode_s, "tokens/s"),
            "experts_per_token": (self.kept_slots, self.decode_tokens, "experts"),
            "distinct_experts_per_layer_step": (self.distinct_experts, self.decode_steps, "experts"),
        }
        ratio = {
            name: (total / count if self.decode_steps else float("nan"), unit)
            for name, (total, count, unit) in decoded.items()
        }
        values = {
            "prefill_tokens_per_s": (self.prefill_tokens / self.prefill_s, "tokens/s"),
            "time_to_first_token_s": (self.prefill_s, "s"),
            **ratio,
        }
        figures = {name: {"value": float(value), "unit": unit} for name, (value, unit) in values.items()}
        dropped = {} if self.overflow is None else {"overflow_slots": {"value": self.overflow, "unit": "slots"}}
        return figures | dropped


class Generated(NamedTuple):
    """The completions of a batch, in the order of its requests, and their measurements."""

    completions: list[Completion]
    measured: GenerationMetrics


def steps_at_once(seconds: float, most: int) -> int:
    """Decode steps to take in one call if a single step takes `seconds`: 1 to `most`."""
    return max(1, min(most, int(CALL_S / seconds)))


class Engine:
    """Runs one model: its weights, and the programs compiled for them so far.

    Prompts are read into a prefix (`prefill`), a prefix is put into slots (`insert`), and all slots are decoded
    together, several steps in one call (`step`). Sampling and the end-of-text check run on the device.

    A program is compiled for its shapes and an `Execution`. Changing prompts, lengths and numbers of requests within a
    shape, policies up to k_max, or sampling settings does not recompile. Which step-wise kinds of policy occur in a
    batch is part of the program.

    Args:
        params: as `decoder.split` returns them, on their devices.
        tokenizer: the model's tokenizer.
        end_ids: tokens that end a text.

    Attributes:
        end_I: int32, the sorted `end_ids`, as programs take them.
        most_steps: the most decode steps in one call.
    """

    def __init__(self, params: decoder.Params, tokenizer: tokenizers.Tokenizer, end_ids: Sequence[int]):
        self.params = formats.laid_out(params, jax.default_backend())
        self._tokenizer = tokenizer
        self.end_I = np.array(sorted(set(end_ids)), np.int32)
        self.most_steps = 1 if _widens_in_loops(decoder.dtype_of(params)) else MOST_STEPS
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def compile(self, requests: Sequence[Request], execution: decoder.Execution) -> None:
        """Compiles the programs that `run` needs for these requests and that are not compiled yet.

        Raises:
            ValueError: the caches do not fit in the memory that is available.
        """
        self._prepare(requests, execution)

    def run(
        self,
        requests: Sequence[Request],
        execution: decoder.Execution,
        on_text: Callable[[int, str], object] = lambda index, piece: None,
    ) -> "Generated":
        """Continues all prompts together until the last is finished.

        One call takes as many steps as fit in `CALL_S`. It takes a single step if there are several requests and any of
        them has stop strings: only the host finds those, and a finished row would otherwise go on running experts.

        Args:
            requests: as `make_requests` returns them for the same execution.
            execution: the static half of the steps.
            on_text: called with the index of a request and the next piece of its text, once no stop string can begin in
                it; the pieces of a request add up to the text of its completion.

        Returns:
            The completions and their measurements.

        Raises:
            ValueError: the caches do not fit in the memory that is available.
            NotFiniteError: a token's log-probability is NaN or infinite; a ValueError too.
        """
        prepared = self._prepare(requests, execution)
        grouping, layers = prepared.grouping, execution.architecture.decoder.num_moe_layers
        rows = [RunningRequest(request, self._tokenizer, set(self.end_I.tolist())) for request in requests]
        measured = GenerationMetrics(prefill_tokens=sum(len(request.ids) for request in requests))

        def append_tokens(token_B: np.ndarray, log_probability_B: np.ndarray, alive_B: np.ndarray) -> None:
            """Appends its token to every row that is alive."""
            self._require_finite(log_probability_B, alive_B, rows)
            for index in np.flatnonzero(alive_B).tolist():
                piece = rows[index].append(int(token_B[index]), float(log_probability_B[index]))
                if piece:
                    on_text(index, piece)

        began = time.perf_counter()
        first, slots = self._read(prepared, execution)
        measured.prefill_s = time.perf_counter() - began
        if execution.dispatch.drops:
            measured.overflow = int(first.overflow)
        for row, kept, request in zip(rows, first.kept_B.tolist(), requests):
            row.record_prompt(kept / (layers * len(request.ids)))
        append_tokens(first.token_B, first.log_probability_B, np.arange(grouping.slots) < len(rows))

        began = time.perf_counter()
        continue_B, count = _unfinished(rows, grouping.slots), 1
        one_by_one = len(rows) > 1 and any(request.sampling.stop for request in requests)
        while continue_B.any():
            call_began = time.perf_counter()
            result, slots = self.step(slots, continue_B, count, prepared.live, execution)
            seconds = (time.perf_counter() - call_began) / int(result.count)
            if jax.process_count() > 1:  # whose clocks differ, and which must take the same steps
                seconds = CALL_S / STEPS_OF_SEVERAL
            count = 1 if one_by_one else steps_at_once(seconds, self.most_steps)
            for number in range(int(result.count)):
                alive_B = result.alive_SB[number] & continue_B
                if not alive_B.any():
                    break
                kept_B, distinct = result.kept_SB[number] / layers, float(result.distinct_S[number]) / layers
                measured.add_step(np.count_nonzero(alive_B), float(kept_B.sum()), distinct)
                if measured.overflow is not None:
                    measured.overflow += int(result.overflow_S[number])
                for index in np.flatnonzero(alive_B).tolist():
                    rows[index].record_step(float(kept_B[index]), distinct)
                append_tokens(result.token_SB[number], result.log_probability_SB[number], alive_B)
                continue_B = _unfinished(rows, grouping.slots)
        measured.decode_s = time.perf_counter() - began
        return Generated([row.completion() for row in rows], measured)

    def _prepare(self, requests: Sequence[Request], execution: decoder.Execution) -> "_Prepared":
        """The groups of prompts, padded, and the settings of all slots; compiles every program that they need."""
        grouping = group_by_length(requests, execution)
        batches = [
            pad_prompts([requests[index] for index in group], execution, shape) for group, shape in grouping.groups
        ]
        whole = len(batches) == 1
        prefixes = [] if whole else [(batch.shape.batch, batch.shape.memory) for batch in batches]
        needed = [(grouping.slots, grouping.memory), *sorted(prefixes, key=np.prod)[-1:]]
        caches.require_memory(
            execution.architecture,
            needed,
            decoder.dtype_of(self.params),
            execution.layout,
            execution.channel_multiple,
        )
        live = batches[0].live if whole else live_of(requests, grouping.slots, execution)
        slots = self._shapes(grouping.slots, grouping.memory, execution)
        for batch in batches:
            self.prefill_program(batch, execution)
        for prefix in prefixes:
            self._insert_program(slots, self._shapes(*prefix, execution), execution)
        if max(request.max_new_tokens for request in requests) > 1:
            self.decode_program(slots, live, execution)
        return _Prepared(grouping, batches, live)

    def _read(self, prepared: "_Prepared", execution: decoder.Execution) -> tuple[PrefillResult, CacheSlots]:
        """Reads all prompts; returns what was sampled for every slot, on the host, and the slots."""
        grouping, batches, _ = prepared
        if len(batches) == 1:
            result, slots = self.prefill(batches[0], execution)
            return jax.device_get(result), slots
        slots, parts = self.empty(grouping.slots, grouping.memory, execution), []
        for (group, _), batch in zip(grouping.groups, batches):
            result, prefix = self.prefill(batch, execution)
            slots = self.insert(slots, prefix, group, execution)
            del prefix  # before the next one is made
            parts.append((list(group), jax.device_get(result)))
        token_B, kept_B = np.zeros((2, grouping.slots), np.int32)
        log_probability_B = np.zeros(grouping.slots, np.float32)
        for group, result in parts:
            for all_slots, new in zip((token_B, log_probability_B, kept_B), result[:3]):
                all_slots[group] = new[: len(group)]
        distinct, overflow = (sum(getattr(result, name) for _, result in parts) for name in ("distinct", "overflow"))
        return PrefillResult(token_B, log_probability_B, kept_B, distinct, overflow, None), slots

    def _require_finite(
        self, log_probability_B: np.ndarray, alive_B: np.ndarray, rows: Sequence[RunningRequest]
    ) -> None:
        for index in np.flatnonzero(alive_B & ~np.isfinite(log_probability_B)).tolist():
            try:
                require_finite(log_probability_B[index], rows[index].next_token(index + 1), self.params)
            except NotFiniteError as error:
                error.completions = tuple(row.completion() for row in rows)
                raise

    def prefill(self, batch: PaddedPrompts, execution: decoder.Execution) -> tuple[PrefillResult, CacheSlots]:
        """Reads the prompts of a batch and samples the first token of each.

        Returns:
            What was sampled, and the prefix.

        Raises:
            ValueError: the cache does not fit in the memory that is available.
        """
        return self.prefill_program(batch, execution)(*self._prefill_inputs(batch, execution))

    def empty(self, slots: int, memory: int, execution: decoder.Execution) -> CacheSlots:
        """Empty slots, each with a cache of `memory` positions."""
        layout, dtype = execution.layout, decoder.dtype_of(self.params)

        def make():
            cache = caches.allocate(execution.architecture, slots, memory, dtype, layout, execution.channel_multiple)
            return CacheSlots(cache, *(jax.numpy.zeros(slots, np.int32) for _ in CacheSlots._fields[1:]))

        if layout is None:
            return make()
        return jax.jit(make, out_shardings=steps.shardings_of(jax.eval_shape(make), layout))()

    def insert(
        self, slots: CacheSlots, prefix: CacheSlots, places: Sequence[int], execution: decoder.Execution
    ) -> CacheSlots:
        """Writes the first rows of a prefix into the slots `places`. Do not use `slots` or `prefix` afterwards."""
        place_B = np.zeros(len(prefix.token_B), np.int32)
        place_B[: len(places)] = places
        given = on_all((place_B, np.int32(len(places))), execution.layout)
        return self._insert_program(slots, prefix, execution)(slots, prefix, *given)

    def step(
        self, slots: CacheSlots, continue_B: np.ndarray, count: int, live: Live, execution: decoder.Execution
    ) -> tuple[DecodeResult, CacheSlots]:
        """Samples up to `count` tokens for every unfinished slot in `continue_B`.

        Args:
            slots: do not use them afterwards.
            continue_B: bool; False finishes a slot.
            count: at most `most_steps`.
            live: settings of the slots.
            execution: the static half of the step.

        Returns:
            The result, on the host, and the slots.
        """
        program = self.decode_program(slots, live, execution)
        continue_B, count, end_I = on_all((continue_B, np.int32(count), self.end_I), execution.layout)
        result, slots = program(self.params, slots, continue_B, count, end_I, live)
        return jax.device_get(result), slots

    def _shapes(self, slots: int, memory: int, execution: decoder.Execution) -> CacheSlots:
        shapes = jax.eval_shape(lambda: self.empty(slots, memory, execution))
        if execution.layout is None:
            return shapes
        shardings = steps.shardings_of(shapes, execution.layout)
        return jax.tree.map(
            lambda one, sharding: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), shapes, shardings
        )

    def _prefill_inputs(self, batch: PaddedPrompts, execution: decoder.Execution) -> tuple:
        given = (batch.tokens_BT, batch.length_B, batch.budget_B, self.end_I)
        return self.params, *on_all(given, execution.layout), batch.live

    def prefill_program(
        self, batch: PaddedPrompts, execution: decoder.Execution, routing: bool = False
    ) -> jax.stages.Compiled:
        """`steps.prefill`, compiled for the shape of a batch.

        Raises:
            ValueError: the cache does not fit in the memory that is available.
        """
        shape = batch.shape
        static = {"execution": execution, "memory": shape.memory, "chunk": caches.CHUNK, "routing": routing}
        key = (steps.prefill, execution, shape, routing, jax.tree.structure(batch.live))
        if key not in self._programs:
            needed, dtype = [(shape.batch, shape.memory)], decoder.dtype_of(self.params)
            caches.require_memory(execution.architecture, needed, dtype, execution.layout, execution.channel_multiple)
        return self._program(key, lambda: steps.prefill.lower(*self._prefill_inputs(batch, execution), **static))

    def _insert_program(
        self, slots: CacheSlots, prefix: CacheSlots, execution: decoder.Execution
    ) -> jax.stages.Compiled:
        layout = execution.layout
        key = (steps.insert, slots.cache[0].shape, prefix.cache[0].shape, layout)
        given = on_all((np.zeros(prefix.token_B.shape, np.int32), np.int32(0)), layout)
        return self._program(key, lambda: steps.insert.lower(slots, prefix, *given, layout=layout))

    def decode_program(
        self, slots: CacheSlots, live: Live, execution: decoder.Execution, routing: bool = False
    ) -> jax.stages.Compiled:
        """`steps.decode`, compiled for slots, or for their shapes, with room for `most_steps` steps."""
        rows, memory = slots.cache[0].shape[1:3]
        continue_B, count, end_I = on_all((np.zeros(rows, bool), np.int32(1), self.end_I), execution.layout)
        given = (self.params, slots, continue_B, count, end_I, live)
        static = {"execution": execution, "most": self.most_steps, "routing": routing}
        key = (steps.decode, execution, rows, memory, routing, jax.tree.structure(live))
        return self._program(key, lambda: steps.decode.lower(*given, **static))

    def _program(self, key: tuple, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        if key not in self._programs:
            self._programs[key] = lower().compile()
        return self._programs[key]


def _widens_in_loops(dtype: jax.numpy.dtype) -> bool:
    """Whether XLA converts a whole half-precision embedding to float32 before a loop that reads a row of it."""
    return dtype.itemsize < 4 and jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11)


class _Prepared(NamedTuple):
    grouping: Grouping
    batches: list[PaddedPrompts]  # one per group
    live: Live  # of all slots


def _unfinished(rows: Sequence[RunningRequest], slots: int) -> np.ndarray:
    """Which slots have a row that is not finished."""
    return np.array([row.finish_reason is None for row in rows] + [False] * (slots - len(rows)))
