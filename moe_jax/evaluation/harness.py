"""A model under a policy as lm-evaluation-harness sees it: published tasks, with any number of active experts.

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
from moe_jax.model.decoder import Execution
from moe_jax.text import chat, framing

MAX_NEW_TOKENS = 256  # where a task does not say, as lm-eval's own models have it
_SAMPLING = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class LanguageModel(TemplateLM):
    """What `lm_eval.simple_evaluate(model=...)` takes.

    How a context and a continuation become tokens is lm-eval's own: both are encoded as one text, which is cut behind
    as many tokens as the context alone has, spaces at its end counting to the continuation. A tokenizer that joins the
    end of a context with the beginning of a continuation is therefore wronged, as it is by all of lm-eval's models.

    Attributes:
        num_truncated: requests whose context has lost its beginning to the length of the model's, so far.

    Args:
        folder: of the checkpoint, for its special tokens and its chat template.
        engine: holds the weights, and generates.
        tokenizer: of the model.
        execution: the static half of the steps; policies keep at most its `k_max` experts.
        policy: which experts run, a spec such as "topk:4"; row-wise for any request but those of generation.
        batch_size: rows per compiled step.
        seed: of the draws of generation, where a task samples.

    Raises:
        ValueError: the policy does not parse or does not fit the model, or the checkpoint names no token that could
            stand before a text.
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
        """Tokens that the model takes."""
        return self._execution.architecture.decoder.max_context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Tells lm-eval's caches of requests apart."""
        return str(self._folder.resolve()).replace(os.sep, "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; by default with what the tokenizer puts around one, unless it is there already."""
        bare = self._tokenizer.encode(string, add_special_tokens=False).ids
        if add_special_tokens is False or (add_special_tokens is None and bare[:1] == [self._prefix_id]):
            return bare
        return self._tokenizer.encode(string).ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the checkpoint's own template; ValueError where it has none."""
        return chat.render_messages(*chat.load_template(self._folder), chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, and whether greedy decoding would write it.

        Raises:
            ValueError: the policy is not row-wise, or a continuation is empty or longer than the model's context.
        """
        return super().loglikelihood(requests, disable_tqdm=True)  # its own bar ignores where it is printed

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [Pair(context or [self._prefix_id], continuation) for _, context, continuation in requests]

        def keep(index: int, scored: Scored) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], tuple(scored))

        return [tuple(scored) for scored in self._score(pairs, "loglikelihood", keep)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in windows that do not overlap but for the last.

        The token that stands before the text is given, not scored. lm-eval's own Hugging Face model scores it once
        more where the tokenizer writes it.
        """
        owner, pairs = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self._prefix_id, self.max_length, context_len=1):
                owner.append(number)
                pairs.append(Pair(*make_disjoint_window(window)))
        scored = self._score(pairs, "loglikelihood_rolling", lambda index, scored: None)
        totals = np.bincount(owner, [one.log_probability for one in scored], len(requests)).tolist()
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

        As lm-eval's own models have it, the text of the token that ends a text is one more stop string, and a
        continuation is decoded without its context: what the decoder strips at the head of a text is missing. Contexts
        lose their beginning where the tokens asked for would not fit behind them. A request that samples
        draws by its place among all, not by what shares its batch.

        Raises:
            ValueError: a setting of generation that we do not have, or no room for a context.
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
        for one in stop:
            text = text.split(one)[0]
        return text


def sampling_of(arguments: Mapping[str, Any]) -> SamplingConfig:
    """What a task's `generation_kwargs` ask for, in our terms; `do_sample` without a temperature draws at 1.

    Raises:
        ValueError: a setting that we do not have, or a value that is out of its range.
    """
    given = normalize_gen_kwargs(dict(arguments), MAX_NEW_TOKENS)
    unknown = sorted(name for name in given if name not in _SAMPLING and (name, given[name]) != ("num_beams", 1))
    if unknown:
        raise ValueError(
            f"generation_kwargs: {unknown[0]} = {given[unknown[0]]!r} is not supported: expected {', '.join(_SAMPLING)}"
        )
    return SamplingConfig(
        given["max_gen_toks"],
        float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
        int(given.get("top_k", 0)),
        float(given.get("top_p", 1.0)),
        tuple(filter(None, given["until"])),
    )
