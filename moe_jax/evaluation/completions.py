"""Completion parse rate: how often the body that a model writes for a function's header is Python that parses."""

import ast
import dataclasses
import itertools
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
import tokenizers
from tqdm import tqdm

from moe_jax.config.schema import SamplingConfig
from moe_jax.engine.generate import Engine
from moe_jax.engine.request import make_requests
from moe_jax.evaluation.journal import Journal
from moe_jax.evaluation.picking import pick_evenly
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.text.documents import Document

PROMPT = 128  # tokens, which end with the header
BATCH = 128  # completions at a time
SAMPLED_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a function, and the tokens that lead up to its body."""

    document: int  # index
    ids: tuple[int, ...]  # whole tokens; they end with the line break and the indentation before the body
    text: str  # from the line of `def` to the body's first character
    column: int  # of `def`


def make_headers(
    documents: Sequence[Document], tokenizer: tokenizers.Tokenizer, count: int, seed: int = 0
) -> list[Header]:
    """Picks functions from documents at random, as evenly over them as they permit.

    Args:
        documents: the held-out text; those that this Python cannot parse are skipped.
        tokenizer: the model's tokenizer.
        count: how many headers.
        seed: the seed of the random choice; the same arguments give the same headers.

    Raises:
        ValueError: the documents have fewer headers.
    """

    def make(document: int, function: Sequence[int]) -> Header | None:
        return _make_header(document, documents[document].text, *function, tokenizer)

    functions = [_functions(document.text) for document in documents]
    headers = pick_evenly(functions, make, count, np.random.default_rng(seed))
    if len(headers) < count:
        raise ValueError(
            f"the text has {len(headers)} headers of functions: expected {count}; "
            f"with evaluation.completion_headers={len(headers)} no more are completed"
        )
    return headers


def _functions(text: str) -> list[tuple[int, int]]:
    """The offsets in characters of each `def` line and of its body; only functions whose body starts on a new line."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    starts = np.cumsum([0] + [len(line) + 1 for line in text.split("\n")])
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[0]
            spans.append((starts[node.lineno - 1], starts[body.lineno - 1] + body.col_offset))
    return [(begin, body) for begin, body in spans if "\n" in text[begin:body] and text[:body].endswith((" ", "\t"))]


def _make_header(document: int, text: str, begin: int, body: int, tokenizer: tokenizers.Tokenizer) -> Header | None:
    """The header between two offsets; None if a token spans the start of the body, so that no prompt can end there."""
    encoded = tokenizer.encode(text[: body + 1])
    count = sum(end <= body for _, end in encoded.offsets)
    if not count or encoded.offsets[count - 1][1] != body:
        return None
    line = text[begin:body]
    return Header(document, tuple(encoded.ids[max(0, count - PROMPT) : count]), line, _indentation(line))


def parses(header: Header, text: str, finished: bool) -> bool:
    """Whether a header and the body written for it are a function that this Python parses.

    The body ends before the first line that is indented no deeper than the header. If there is no such line and the
    text is not finished, its last line may be incomplete and is dropped; an empty body does not parse.

    Args:
        header: as `make_headers` gives it.
        text: what the model wrote.
        finished: whether the model ended the text itself.
    """
    first, *rest = text.split("\n")
    deeper = list(itertools.takewhile(lambda line: not line.strip() or _indentation(line) > header.column, rest))
    lines = [first, *deeper]
    if len(deeper) == len(rest) and not finished:
        lines.pop()
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(textwrap.dedent(header.text + "\n".join(lines)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def complete(
    engine: Engine,
    tokenizer: tokenizers.Tokenizer,
    headers: Sequence[Header],
    compared: Sequence[policies.Policy],
    execution: decoder.Execution,
    *,
    max_new_tokens: int,
    seed: int = 0,
    journal: Journal | None = None,
) -> np.ndarray:
    """Generates every body under every policy, greedily and at a temperature of 0.8; shows progress on a terminal.

    All policies and temperatures share one compiled step. A header uses the same random numbers under every policy.

    Args:
        engine: the model's engine.
        tokenizer: the model's tokenizer.
        headers: as `make_headers` gives them.
        compared: the policies.
        execution: the static half of the step.
        max_new_tokens: the most tokens of each body.
        seed: the seed of sampling.
        journal: keeps finished batches; None: they are not kept.

    Returns:
        bool [policies, 2, headers]: whether the completion parses; greedy first, then sampled.
    """
    if not headers:
        return np.zeros((len(compared), 2, 0), bool)
    journal = journal or Journal(None, {})
    all_headers = list(headers) * (2 * len(compared))
    settings = [(policy, temperature) for policy in compared for temperature in (0.0, SAMPLED_TEMPERATURE)]
    requests = []
    for policy, temperature in settings:
        sampling = SamplingConfig(max_new_tokens, temperature)
        seeds = [(seed + number) % 2**32 for number in range(len(headers))]
        prompts = [header.ids for header in headers]
        requests += make_requests(prompts, tokenizer, execution, sampling=sampling, policy=policy, seed=seeds)
    parsed = []
    for first in tqdm(range(0, len(requests), BATCH), desc="completions", unit="batch", disable=None):
        batch = slice(first, first + BATCH)

        def compute(batch=batch):
            completions = engine.run(requests[batch], execution).completions
            judged = [
                parses(header, completion.text, completion.finish_reason == "end")
                for header, completion in zip(all_headers[batch], completions)
            ]
            return {"parses": judged}

        parsed.append(journal.once(f"completions-{first:06d}", compute)["parses"])
    return np.concatenate(parsed).reshape(len(compared), 2, len(headers))
