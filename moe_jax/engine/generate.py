"""Generation: a batch of requests, each with its own policy and sampling, to completions."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from moe_jax.engine import cache as caches
from moe_jax.engine import steps
from moe_jax.engine.request import Request
from moe_jax.engine.sampling import Sampling
from moe_jax.engine.steps import Drawn, Live
from moe_jax.engine.stopping import StoppingText
from moe_jax.model import decoder
from moe_jax.model.finite import NotFiniteError, require_finite
from moe_jax.routing import policies
from moe_jax.routing.selection import distinct_experts


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was made of one prompt.

    Attributes:
        text: the continuation, up to a stop string or the end of text, neither included: what decoding it adds to its
            prompt, the space before its first word included. Special tokens have no text.
        ids: every token drawn, those of a stop string and the end-of-text token included.
        log_probabilities: of each of `ids` under the model itself, in nats, before temperature and cuts.
        experts_per_token: slots that the request kept, mean over MoE layers and this request's decode steps; where it
            took no such step, over the tokens of its prompt.
        distinct_experts_per_layer_step: experts that one MoE layer ran in one decode step, for all requests of the
            batch together; mean over MoE layers and this request's decode steps. NaN where it took no such step: the
            first token comes from reading the prompt.
        finish_reason: "stop" (a stop string, or a special token that one names), "end" (the end-of-text token) or
            "length" (`max_new_tokens`, or the model's context).
    """

    text: str
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    experts_per_token: float
    distinct_experts_per_layer_step: float
    finish_reason: str


@dataclasses.dataclass
class Measured:
    """What a batch took, programs and weights being there. Padding and finished rows count nowhere."""

    prefill_tokens: int
    prefill_s: float = 0.0  # until the first token of every request is on the host
    decode_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0  # drawn by those steps
    kept_slots: int = 0  # of those steps, mean over MoE layers, like what follows
    distinct_experts: float = 0.0  # experts that held a slot, summed over those steps

    def add_step(self, tokens: int, chosen_LNK: np.ndarray) -> float:
        """Counts one decode step of so many rows alive; returns its distinct experts, mean over MoE layers."""
        self.decode_steps += 1
        self.decode_tokens += tokens
        self.kept_slots += np.count_nonzero(chosen_LNK >= 0) / len(chosen_LNK)
        distinct = float(distinct_experts(chosen_LNK).mean())
        self.distinct_experts += distinct
        return distinct

    def figures(self) -> dict[str, dict[str, float | str]]:
        """The figures of result.json; NaN where there was no decode step."""
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
        return {name: {"value": float(value), "unit": unit} for name, (value, unit) in values.items()}


class Generated(NamedTuple):
    """The completions of a batch, in the order of its requests, and what they took."""

    completions: list[Completion]
    measured: Measured


class Engine:
    """Runs one model: its weights, and the programs compiled for them so far.

    A program is compiled for a `cache.Shape` and an `Execution`. Prompts, lengths and numbers of requests within a
    shape, policies up to k_max, and sampling settings are data: they compile nothing. Which batch-aware kinds occur in
    a batch is part of the program.

    Args:
        params: as `decoder.split` gives them, on their devices.
        tokenizer: of the model.
        end_ids: tokens that end a text.
    """

    def __init__(self, params: decoder.Params, tokenizer: tokenizers.Tokenizer, end_ids: Sequence[int]):
        self.params = params
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def compile(self, requests: Sequence[Request], execution: decoder.Execution) -> None:
        """Compiles what `run` needs for these requests, unless it is there already.

        Raises:
            ValueError: the cache does not fit in the memory that is available.
        """
        self._prepared(requests, execution)

    def run(
        self,
        requests: Sequence[Request],
        execution: decoder.Execution,
        on_text: Callable[[int, str], object] = lambda index, piece: None,
    ) -> Generated:
        """Continues all prompts together, until the last is finished.

        Args:
            requests: as `make_requests` gives them for the same execution.
            execution: the static half of the steps.
            on_text: called with the index of a request and the next piece of its text as soon as that is certain; the
                pieces of a request add up to the text of its completion.

        Returns:
            The completions, and what they took.

        Raises:
            ValueError: the cache does not fit in the memory that is available.
            NotFiniteError: a token's log-probability is NaN or infinite; a ValueError too.
        """
        batch, prefill, decode = self._prepared(requests, execution)
        rows = [_Row(request, self._tokenizer, self._end_ids) for request in requests]
        measured = Measured(prefill_tokens=sum(len(request.ids) for request in requests))

        def hand_out(drawn: Drawn, alive_B: np.ndarray) -> np.ndarray:
            """Gives every row that is alive its token; returns those that still are."""
            self._require_finite(drawn, alive_B, rows)
            for index in np.flatnonzero(alive_B).tolist():
                piece = rows[index].take(int(drawn.token_B[index]), float(drawn.log_probability_B[index]))
                if piece:
                    on_text(index, piece)
            return np.array([row.finish_reason is None for row in rows] + [False] * (len(alive_B) - len(rows)))

        began = time.perf_counter()
        drawn, cache = prefill(self.params, batch.tokens_BT, batch.length_B, batch.valid_BT, batch.live)
        drawn = jax.device_get(drawn)
        measured.prefill_s = time.perf_counter() - began
        position_B = batch.length_B
        prompt_LBTK = drawn.chosen_LNK.reshape(len(drawn.chosen_LNK), *batch.tokens_BT.shape, -1)
        for index, row in enumerate(rows):
            row.read(prompt_LBTK[:, index, : batch.length_B[index]])
        alive_B = hand_out(drawn, batch.valid_BT[:, 0])

        began = time.perf_counter()
        while alive_B.any():
            drawn, cache = decode(self.params, cache, drawn.token_B, position_B, alive_B, batch.live)
            drawn = jax.device_get(drawn)
            distinct = measured.add_step(np.count_nonzero(alive_B), drawn.chosen_LNK)
            for index in np.flatnonzero(alive_B).tolist():
                rows[index].step(drawn.chosen_LNK[:, index], distinct)
            position_B = position_B + alive_B
            alive_B = hand_out(drawn, alive_B)
        measured.decode_s = time.perf_counter() - began
        return Generated([row.completion() for row in rows], measured)

    def _require_finite(self, drawn: Drawn, alive_B: np.ndarray, rows: Sequence["_Row"]) -> None:
        for index in np.flatnonzero(alive_B & ~np.isfinite(drawn.log_probability_B)).tolist():
            try:
                require_finite(drawn.log_probability_B[index], rows[index].next_token(index + 1), self.params)
            except NotFiniteError as error:
                error.completions = tuple(row.completion() for row in rows)
                raise

    def _prepared(
        self, requests: Sequence[Request], execution: decoder.Execution
    ) -> tuple["Batch", jax.stages.Compiled, jax.stages.Compiled | None]:
        """The batch, its prefill, and its decode step unless the prefill draws all there is to draw."""
        batch = batch_of(requests, execution)
        prefill = self.prefill_program(batch, execution)
        if max(request.max_new_tokens for request in requests) == 1:
            return batch, prefill, None
        return batch, prefill, self.decode_program(batch, execution)

    def prefill_program(self, batch: "Batch", execution: decoder.Execution) -> jax.stages.Compiled:
        """The program that reads the prompts of a batch, for those who time steps rather than `run` them.

        It takes (params, tokens_BT, length_B, valid_BT, live), and returns a `Drawn` and the cache.

        Raises:
            ValueError: the cache does not fit in the memory that is available.
        """
        shape, dtype = batch.shape, decoder.dtype_of(self.params)
        caches.require_memory(execution.architecture, shape, dtype)
        key = (execution, shape, jax.tree.structure(batch.live))
        if key not in self._programs:
            arguments = (self.params, batch.tokens_BT, batch.length_B, batch.valid_BT, batch.live)
            lowered = steps.prefill.lower(*arguments, execution=execution, memory=shape.memory, chunk=caches.CHUNK)
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def decode_program(self, batch: "Batch", execution: decoder.Execution) -> jax.stages.Compiled:
        """The program of one decode step of a batch.

        It takes (params, cache, token_B, position_B, alive_B, live), and returns a `Drawn` and the cache, which it
        writes in place.
        """
        shape, dtype = batch.shape, decoder.dtype_of(self.params)
        key = (execution, shape.batch, shape.memory, jax.tree.structure(batch.live))
        if key not in self._programs:
            cache = jax.eval_shape(lambda: caches.allocate(execution.architecture, shape.batch, shape.memory, dtype))
            rows = (batch.length_B, batch.length_B, batch.valid_BT[:, 0], batch.live)
            self._programs[key] = steps.decode.lower(self.params, cache, *rows, execution=execution).compile()
        return self._programs[key]


class Batch(NamedTuple):
    """Requests as arrays, padded to their shape. Rows without a request have one token that is not valid."""

    shape: caches.Shape
    tokens_BT: np.ndarray  # int32, padded at the end
    length_B: np.ndarray  # int32
    valid_BT: np.ndarray  # bool
    live: Live


def batch_of(requests: Sequence[Request], execution: decoder.Execution) -> Batch:
    """Pads requests to the shape that they share, with their live settings on the device."""
    architecture = execution.architecture
    lengths = [len(request.ids) for request in requests]
    budgets = [request.max_new_tokens for request in requests]
    shape = caches.shape_of(lengths, budgets, architecture.decoder.max_context)
    tokens_BT = np.zeros((shape.batch, shape.length), np.int32)
    length_B = np.ones(shape.batch, np.int32)
    valid_BT = np.zeros((shape.batch, shape.length), bool)
    for row, request in enumerate(requests):
        tokens_BT[row, : lengths[row]] = request.ids
        valid_BT[row, : lengths[row]] = True
        length_B[row] = lengths[row]
    padded = [*requests, *requests[:1] * (shape.batch - len(requests))]
    live = Live(
        policies.settings([request.policy for request in padded], architecture, execution.k_max),
        Sampling(
            np.array([request.sampling.temperature for request in padded], np.float32),
            np.array([request.sampling.top_k for request in padded], np.int32),
            np.array([request.sampling.top_p for request in padded], np.float32),
            np.array([request.seed for request in padded], np.uint32),
        ),
    )
    return Batch(shape, tokens_BT, length_B, valid_BT, jax.device_put(live))


class _Row:
    """One request on its way to a completion."""

    def __init__(self, request: Request, tokenizer: tokenizers.Tokenizer, end_ids: frozenset[int]):
        self.finish_reason: str | None = None
        self._request = request
        self._end_ids = end_ids
        self._stopping = StoppingText(tokenizer, request.sampling.stop, request.ids)
        self._text = ""
        self._ids: list[int] = []
        self._log_probabilities: list[float] = []
        self._kept_of_prompt = float("nan")
        self._kept: list[float] = []  # of each decode step
        self._distinct: list[float] = []

    def read(self, chosen_LTK: np.ndarray) -> None:
        """Counts the slots of the prompt."""
        self._kept_of_prompt = _kept_slots(chosen_LTK)

    def step(self, chosen_LK: np.ndarray, distinct: float) -> None:
        """Counts a decode step: this row's slots, and the distinct experts of all rows."""
        self._kept.append(_kept_slots(chosen_LK))
        self._distinct.append(distinct)

    def take(self, token: int, log_probability: float) -> str:
        """Adds a token; returns the text that it makes certain."""
        self._ids.append(token)
        self._log_probabilities.append(log_probability)
        if token in self._end_ids:
            piece, self.finish_reason = self._stopping.flush(token), "end"
        else:
            piece = self._stopping.push(token)
            if not self._stopping.stopped and len(self._ids) == self._request.max_new_tokens:
                piece, self.finish_reason = piece + self._stopping.flush(), "length"
        if self._stopping.stopped:
            self.finish_reason = "stop"
        self._text += piece
        return piece

    def next_token(self, prompt: int) -> str:
        """Names the token that comes next, of a prompt of that number."""
        return f"the log-probability of token {len(self._ids) + 1} after prompt {prompt}, {self._request.policy.spec!r}"

    def completion(self) -> Completion:
        """What has been made so far; `finish_reason` is None where that is not finished."""
        kept = float(np.mean(self._kept)) if self._kept else self._kept_of_prompt
        distinct = float(np.mean(self._distinct)) if self._distinct else float("nan")
        made = (self._text, tuple(self._ids), tuple(self._log_probabilities))
        return Completion(*made, kept, distinct, self.finish_reason)


def _kept_slots(chosen: np.ndarray) -> float:
    """Mean over layers and tokens."""
    return float(np.count_nonzero(chosen >= 0) / (chosen.size / chosen.shape[-1]))
