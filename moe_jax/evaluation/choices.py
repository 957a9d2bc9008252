"""Next-line choice: which of four lines comes next in a file, the true one or one of three later lines."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from moe_jax.evaluation.journal import Journal
from moe_jax.evaluation.picking import pick_evenly
from moe_jax.evaluation.scoring import LabeledRows, score
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.text.documents import Document

OPTIONS = 4
ROW = 192  # tokens: the prefix, then the options one after another
LONGEST_OPTIONS = 96  # tokens of all options together
SHORTEST_LINE = 8  # characters without indentation: `else:` and brackets carry little information
EARLIEST_LINE = 5  # lines before the question


@dataclasses.dataclass(frozen=True)
class Question:
    """A prefix, and four lines of which the first is the true continuation."""

    document: int  # index
    prefix_ids: tuple[int, ...]
    option_ids: tuple[tuple[int, ...], ...]
    option_bytes: tuple[int, ...]  # of each option's line


def make_questions(
    documents: Sequence[Document], tokenizer: tokenizers.Tokenizer, count: int, seed: int = 0
) -> list[Question]:
    """Picks questions from documents at random, as evenly over them as their lines permit.

    All four lines keep their indentation. Each occurs once in the whole text, which excludes boilerplate such as
    licences. Wrong options come from later lines, as an earlier line would tempt a model that copies what it has read.
    All four continue the same tokens: the prefix is what the four encodings of text and line have in common.

    Args:
        documents: the held-out text.
        tokenizer: the model's tokenizer.
        count: how many questions.
        seed: the seed of the random choice; the same arguments give the same questions.

    Raises:
        ValueError: the documents have fewer questions.
    """
    rng = np.random.default_rng(seed)
    lines = [[line.rstrip() for line in document.text.split("\n")] for document in documents]
    places = _places(lines)

    def make(document: int, place: int) -> Question | None:
        later = [other for other in places[document] if other > place]
        if place < EARLIEST_LINE or len(later) < OPTIONS - 1:
            return None
        asked = [place, *rng.choice(later, OPTIONS - 1, replace=False).tolist()]
        return _make_question(document, lines[document], asked, tokenizer)

    questions = pick_evenly(places, make, count, rng)
    if len(questions) < count:
        raise ValueError(
            f"the text has {len(questions)} next-line questions: expected {count}; "
            f"with evaluation.choice_questions={len(questions)} no more are asked"
        )
    return questions


def _places(lines: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each document, the numbers of lines that can be asked for: long enough, and unique in the whole text."""
    bare = [[line.strip() for line in document_lines] for document_lines in lines]
    occurrences = collections.Counter(itertools.chain.from_iterable(bare))
    return [
        [place for place, line in enumerate(bare_lines) if len(line) >= SHORTEST_LINE and occurrences[line] == 1]
        for bare_lines in bare
    ]


def _make_question(
    document: int, lines: Sequence[str], asked: Sequence[int], tokenizer: tokenizers.Tokenizer
) -> Question | None:
    """The question for four lines of a document, the true one first; None if they do not fit in a row.

    Args:
        document: its index.
        lines: all its lines.
        asked: the numbers of the four lines.
        tokenizer: the model's tokenizer.
    """
    before = "\n".join(lines[: asked[0]])
    ids = [encoding.ids for encoding in tokenizer.encode_batch([f"{before}\n{lines[place]}" for place in asked])]
    num_shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids)))
    options = tuple(tuple(option_ids[num_shared:]) for option_ids in ids)
    num_option_tokens = sum(map(len, options))
    if not all(options) or num_option_tokens > LONGEST_OPTIONS:
        return None
    prefix = tuple(ids[0][max(0, num_shared - (ROW - num_option_tokens)) : num_shared])
    return Question(document, prefix, options, tuple(len(lines[place].encode()) for place in asked))


def score_options(
    params: decoder.Params,
    questions: Sequence[Question],
    compared: Sequence[policies.Policy],
    execution: decoder.Execution,
    *,
    batch_size: int,
    journal: Journal | None = None,
) -> np.ndarray:
    """Scores every option of every question under every policy, with a progress bar on a terminal.

    The options of a question share one row, each as a segment that continues the same prefix, so the prefix is read
    only once.

    Args:
        params: as `decoder.split` gives them.
        questions: as `make_questions` gives them.
        compared: the policies.
        execution: the static half of the step.
        batch_size: rows of `ROW` tokens per compiled step.
        journal: keeps finished batches; None: they are not kept.

    Returns:
        float64 [policies, questions, options]: nats per byte of the line; lower is likelier.
    """
    journal = journal or Journal(None, {})
    settings = [
        policies.settings([policy] * batch_size, execution.architecture, execution.k_max) for policy in compared
    ]
    per_byte = [np.zeros((len(compared), 0, OPTIONS))]  # there may be no questions
    starts = range(0, len(questions), batch_size)
    for first in tqdm(starts, desc="choices", unit="batch", disable=None if questions else True):
        asked = questions[first : first + batch_size]

        def compute(asked=asked):
            rows = _lay_out(asked, batch_size)
            nats_PY = [
                score(params, rows.batch, [live], execution, specs=[policy.spec])[0].nats_Y
                for policy, live in zip(compared, settings)
            ]
            return {"nats": [np.bincount(rows.option_Y, nats_Y, len(asked) * OPTIONS) for nats_Y in nats_PY]}

        nats = journal.once(f"choices-{first:06d}", compute)["nats"].reshape(len(compared), len(asked), OPTIONS)
        per_byte.append(nats / np.array([question.option_bytes for question in asked]))
    return np.concatenate(per_byte, axis=1)


def is_right(per_byte: np.ndarray) -> np.ndarray:
    """Whether the true line is likelier than all others, from the result of `score_options`; a tie counts as wrong."""
    return per_byte[..., 0] < per_byte[..., 1:].min(axis=-1)


class _QuestionRows(NamedTuple):
    batch: LabeledRows
    option_Y: np.ndarray  # question * OPTIONS + option of each scored label


def _lay_out(questions: Sequence[Question], batch_size: int) -> _QuestionRows:
    """One row per question: the prefix (segment -1), then each option (segments 1 to 4), with positions after it."""
    tokens_BT, positions_BT, segments_BT = np.zeros((3, batch_size, ROW), np.int32)
    source, label, option = [], [], []
    for row, question in enumerate(questions):
        prefix_length = len(question.prefix_ids)
        tokens_BT[row, :prefix_length] = question.prefix_ids
        positions_BT[row, :prefix_length] = np.arange(prefix_length)
        segments_BT[row, :prefix_length] = -1
        begin = prefix_length
        for number, ids in enumerate(question.option_ids):
            columns = slice(begin, begin + len(ids))
            tokens_BT[row, columns] = ids
            positions_BT[row, columns] = prefix_length + np.arange(len(ids))
            segments_BT[row, columns] = number + 1
            source += [row * ROW + prefix_length - 1, *range(row * ROW + begin, row * ROW + begin + len(ids) - 1)]
            label += ids
            option += [row * OPTIONS + number] * len(ids)
            begin += len(ids)
    padding = (0, batch_size * LONGEST_OPTIONS - len(label))
    source_Y, label_Y = (np.pad(np.array(part, np.int32), padding) for part in (source, label))
    return _QuestionRows(
        LabeledRows(tokens_BT, positions_BT, segments_BT, source_Y, label_Y, len(label)), np.array(option)
    )
