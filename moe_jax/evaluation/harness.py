"""A model under a policy for lm-evaluation-harness: published tasks, with any number of active experts.

Importing this file needs the package `lm_eval`; nothing else in `moe_jax` does.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe_jax import checkpoint
from moe_jax.config.schema import SamplingConfig
from moe_jax.engine.generate import Engine
from moe_jax.engine.request import AnyPolicy, Request, make_requests, policy_of_each
from moe_jax.evaluation.continuations import Pair, Scored, num_truncated, score_continuations, settings_of
from moe_jax.model.execution import Execution
from moe_jax.text import chat, framing

MAX_NEW_TOKENS = 256  # default if a task gives none, as in lm-eval's own models
_SAMPLING = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class LanguageModel(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=...)`.

    lm-eval itself turns a context and a continuation into tokens: it encodes both as one text, and cuts after as many
    tokens as the context alone has; spaces at the end of the context go to the continuation. Where a tokenizer joins
    the end of the context with the beginning of the continuation, the cut is off, as in all of lm-eval's models.

    Attributes:
        num_truncated: number of requests so far whose context was truncated at the beginning to fit the model's.

    Args:
        folder: the checkpoint's folder, for its special tokens and its chat template.
        engine: holds the weights and generates text.
        tokenizer: the model's tokenizer.
        execution: the static half of the steps; policies keep at most its `k_max` experts.
        policy: which experts run, a spec such as "topk:4"; row-wise for all requests but generation.
        batch_size: rows per compiled step.
        seed: the seed of generation, for tasks that sample.

    Raises:
        ValueError: the policy does not parse or does not fit the model, or the checkpoint names no token that can
            precede a text.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        engine: Engine,
        tokenizer: tokenizers.Tokenizer,
        execution: Execution,
        *,
        policy: AnyPolicy = "model",
        batch_size: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        self.num_truncated = 0
        self.batch_size = batch_size
        [self._policy] = policy_of_each(policy, 1)
        settings_of(self._policy, 1, execution)
        self._folder = pathlib.Path(folder)
        self._engine, self._tokenizer, self._execution = engine, tokenizer, execution
        self._seed = seed
        self._prefix_id, self._end_id = framing.outer_ids(self._folder, tokenizer, checkpoint.open(folder).token_ids)
        self._end_text = tuple(filter(None, [tokenizer.decode([self._end_id], skip_special_tokens=False)]))

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self._execution.architecture.decoder.max_context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The name that distinguishes lm-eval's caches of requests."""
        return str(self._folder.resolve()).replace(os.sep, "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; by default with the tokenizer's special tokens, unless the text has them already."""
        bare = self._tokenizer.encode(string, add_special_tokens=False).ids
        if add_special_tokens is False or (add_special_tokens is None and bare[:1] == [self._prefix_id]):
            return bare
        return self._tokenizer.encode(string).ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation with the checkpoint's chat template; ValueError if it has none."""
        return chat.render_messages(*chat.load_template(self._folder), chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability in nats, and whether greedy decoding would write it.

        Raises:
            ValueError: the policy is not row-wise, or a continuation is empty or longer than the model's context.
        """
        return super().loglikelihood(requests, disable_tqdm=True)  # its progress bar prints even without a terminal

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [Pair(context or [self._prefix_id], continuation) for _, context, continuation in requests]

        def keep(index: int, scored: Scored) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], tuple(scored))

        return [tuple(scored) for scored in self._score(pairs, "loglikelihood", keep)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in windows of which only the last overlaps.

        The token that precedes the text is given, not scored. lm-eval's own Hugging Face model also scores it if the
        tokenizer adds it.
        """
        owner, pairs = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self._prefix_id, self.max_length, context_len=1):
                owner.append(number)
                pairs.append(Pair(*make_disjoint_window(window)))
        scored = self._score(pairs, "loglikelihood_rolling", lambda index, scored: None)
        totals = np.bincount(owner, [pair.log_probability for pair in scored], len(requests)).tolist()
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, pairs: Sequence[Pair], name: str, keep) -> list[Scored]:
        self.num_truncated += num_truncated(pairs, self.max_length)
        with tqdm(total=len(pairs), desc=name, unit="request", disable=None) as progress:

            def on_scored(index: int, scored: Scored) -> None:
                keep(index, scored)
                progress.update()

            return score_continuations(
                *(self._engine.params, pairs, self._policy, self._execution),
                batch_size=self.batch_size,
                on_scored=on_scored,
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string or the end of text, neither included.

        As in lm-eval's own models, the text of the end token is one more stop string, and a continuation is decoded
        without its context, so whatever the decoder strips at the start of a text is missing. Contexts are truncated at
        the beginning to leave room for the new tokens. A request that samples is seeded by its index among all
        requests, so its batch does not matter.

        Raises:
            ValueError: a generation setting is not supported, or there is no room for a context.
        """
        prepared = [self._request(number, *request.args) for number, request in enumerate(requests)]
        longest_first = sorted(range(len(prepared)), key=lambda number: -len(prepared[number].ids))
        texts = [""] * len(prepared)
        with tqdm(total=len(prepared), desc="generate_until", unit="request", disable=None) as progress:
            for first in range(0, len(prepared), self.batch_size):
                batch = longest_first[first : first + self.batch_size]
                made = self._engine.run([prepared[number] for number in batch], self._execution).completions
                for number, completion in zip(batch, made):
                    texts[number] = self._cut(completion.ids, prepared[number].sampling.stop)
                    self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                progress.update(len(batch))
        return texts

    def _request(self, number: int, context: str, arguments: Mapping[str, Any]) -> Request:
        sampling = sampling_of(arguments)
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *self._end_text))
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"the task asks for max_gen_toks = {sampling.max_new_tokens}: expected fewer than the model's context, "
                f"{self.max_length}"
            )
        ids = self.tok_encode(context) or [self._prefix_id]
        self.num_truncated += len(ids) > room
        seed = (self._seed + number) % 2**32
        settings = {"sampling": sampling, "policy": self._policy, "seed": seed}
        [request] = make_requests([ids[-room:]], self._tokenizer, self._execution, **settings)
        return request

    def _cut(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        text = self._tokenizer.decode(list(ids))
        for stop_string in stop:
            text = text.split(stop_string)[0]
        return text


def sampling_of(arguments: Mapping[str, Any]) -> SamplingConfig:
    """Converts a task's `generation_kwargs` to our settings; `do_sample` without a temperature samples at 1.

    Raises:
        ValueError: a setting is not supported, or a value is out of range.
    """
    settings = normalize_gen_kwargs(dict(arguments), MAX_NEW_TOKENS)
    for name, value in sorted(settings.items()):
        if name not in _SAMPLING and (name, value) != ("num_beams", 1):
            raise ValueError(f"generation_kwargs: {name} = {value!r} is not supported: expected {', '.join(_SAMPLING)}")
    return SamplingConfig(
        settings["max_gen_toks"],
        float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0,
        int(settings.get("top_k", 0)),
        float(settings.get("top_p", 1.0)),
        tuple(filter(None, settings["until"])),
    )
