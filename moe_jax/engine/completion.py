"""From the tokens sampled for a request to its completion: the text so far, and when it ends."""

import dataclasses
from collections.abc import Set

import numpy as np
import tokenizers

from moe_jax.engine.request import Request
from moe_jax.engine.stopping import StoppingText


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        text: the continuation, without the stop string or the end-of-text token that ended it. It starts with whatever
            follows the prompt, such as a space. Special tokens have no text.
        ids: every token sampled, including those of a stop string and the end-of-text token.
        log_probabilities: the log-probability of each of `ids` under the model itself, in nats, before temperature,
            top-k and top-p.
        experts_per_token: experts that the request kept, mean over MoE layers and this request's decode steps; without
            a decode step, over the tokens of its prompt.
        distinct_experts_per_layer_step: experts that one MoE layer ran in one decode step, for all requests of the
            batch together; mean over MoE layers and this request's decode steps. NaN without a decode step: the first
            token comes from the prefill.
        finish_reason: "stop" (a stop string, which may name a special token), "end" (the end-of-text token) or
            "length" (`max_new_tokens`, or the model's context).
    """

    text: str
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    experts_per_token: float
    distinct_experts_per_layer_step: float
    finish_reason: str


class RunningRequest:
    """A request that is being decoded."""

    def __init__(self, request: Request, tokenizer: tokenizers.Tokenizer, end_ids: Set[int]):
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

    def record_prompt(self, kept: float) -> None:
        """Records how many experts the prompt kept, mean over MoE layers and tokens."""
        self._kept_of_prompt = kept

    def record_step(self, kept: float, distinct: float) -> None:
        """Records a decode step: experts that this row kept and distinct experts of all rows, means over layers."""
        self._kept.append(kept)
        self._distinct.append(distinct)

    def append(self, token: int, log_probability: float) -> str:
        """Adds a token; returns the text that can no longer become part of a stop string."""
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
        """Describes the next token of the prompt with this number, for an error message."""
        return f"the log-probability of token {len(self._ids) + 1} after prompt {prompt}, {self._request.policy.spec!r}"

    def completion(self) -> Completion:
        """The completion so far; `finish_reason` is None while it is not finished."""
        kept = float(np.mean(self._kept)) if self._kept else self._kept_of_prompt
        distinct = float(np.mean(self._distinct)) if self._distinct else float("nan")
        made = (self._text, tuple(self._ids), tuple(self._log_probabilities))
        return Completion(*made, kept, distinct, self.finish_reason)
