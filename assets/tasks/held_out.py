"""The documents of the tasks beside this file, made from the held-out text as a task is loaded.

Nothing is stored twice: `assets/text` has the text, verified against its manifest, and the licences of its sources.
The order is drawn once, so that `--limit 20` takes files of many sources.
"""

import collections
import itertools
import pathlib
import random
from collections.abc import Iterator

import datasets

from moe_jax.text.documents import Document
from moe_jax.text.held_out import load_held_out

FOLDER = pathlib.Path(__file__).parents[1] / "text"
SEED = 0
OPTIONS = 4
EARLIEST_LINE = 5  # lines before what is asked for
CONTEXT_LINES = 20
SHORTEST_LINE, LONGEST_LINE = 12, 100  # characters without indentation: `else:` and brackets tell little

Splits = dict[str, datasets.Dataset]


def files(**_) -> Splits:
    """Whole files, each with its name."""
    return _test_split([{"name": f"{one.source}/{one.name}", "text": one.text} for one in _documents()])


def next_line(**_) -> Splits:
    """Of each file one question: which of four of its lines comes next, the true one or one of three later ones.

    The line before ends in a letter or a digit. Many tokenizers join marks at the end of a line with the line break
    behind them, and lm-eval, which cuts in between, would then lose the break.
    """
    draw = random.Random(SEED)
    made = []
    for lines, telling in _files_of_lines():
        places = [place for place in telling[: 1 - OPTIONS] if lines[place - 1][-1:].isalnum()]
        if places:
            place = draw.choice(places)
            later = [lines[other] for other in telling if other > place]
            options = [lines[place], *draw.sample(later, OPTIONS - 1)]
            draw.shuffle(options)
            made.append({"before": _before(lines, place), "options": options, "answer": options.index(lines[place])})
    return _test_split(made)


def line_end(**_) -> Splits:
    """Of each file one line to finish: what comes behind its last space."""
    draw = random.Random(SEED)
    made = []
    for lines, telling in _files_of_lines():
        places = [place for place in telling if " " in lines[place].strip()]
        if places:
            place = draw.choice(places)
            begin, space, end = lines[place].rpartition(" ")
            made.append({"before": f"{_before(lines, place)}\n{begin}", "end": space + end})
    return _test_split(made)


def _test_split(rows: list[dict]) -> Splits:
    return {"test": datasets.Dataset.from_list(rows)}


def _documents() -> list[Document]:
    documents = list(load_held_out(FOLDER))
    random.Random(SEED).shuffle(documents)
    return documents


def _files_of_lines() -> Iterator[tuple[list[str], list[int]]]:
    """Of each file its lines, and which of them can be asked for: of some length, and written once in all files."""
    cut = [[line.rstrip() for line in document.text.split("\n")] for document in _documents()]
    written = collections.Counter(line.strip() for line in itertools.chain.from_iterable(cut))
    for lines in cut:
        bare = [line.strip() for line in lines]
        telling = [
            place
            for place in range(EARLIEST_LINE, len(lines))
            if SHORTEST_LINE <= len(bare[place]) <= LONGEST_LINE and written[bare[place]] == 1
        ]
        yield lines, telling


def _before(lines: list[str], place: int) -> str:
    return "\n".join(lines[max(0, place - CONTEXT_LINES) : place])
