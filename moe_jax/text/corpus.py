"""The training text: files that are already on the machine, without the held-out text.

A source is `"stdlib"` (the running interpreter's standard library), the name of an installed distribution, or the path
of a file or folder. Left out are files that were not written by hand (`handwritten.py`) and near-duplicates of the
held-out text (`near_duplicates.py`).
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Iterable, Mapping, Sequence

from moe_jax.text import distributions, jsonl
from moe_jax.text.documents import Document, Found, is_file_or_folder, left_out_in_words, read_files, read_path, walk
from moe_jax.text.handwritten import why_not
from moe_jax.text.near_duplicates import HeldOutIndex

STDLIB = "stdlib"


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """What was read from one source, and how many documents were left out, by reason."""

    files: int  # documents; each JSON line is one
    bytes: int  # of UTF-8
    left_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training documents, ordered by source, name and line number.

    Attributes:
        documents: the documents.
        statistics: by source, as named in the settings.
        sha256: of all sources, names and texts; a resumed run compares it.
    """

    documents: tuple[Document, ...]
    statistics: Mapping[str, SourceStatistics]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 in all documents."""
        return sum(statistics.bytes for statistics in self.statistics.values())


def collect(sources: Sequence[str], held_out: Sequence[Document], chat: jsonl.Chat | None = None) -> Corpus:
    """Reads every source, without documents that are not worth training on or that are held out.

    From the standard library and distributions only `.py` files are read, from a folder all files that are not hidden.
    Left out, and counted by reason, are files that are
    - not UTF-8 text (`binary`), or `unreadable`;
    - smaller than `MIN_BYTES` (`tiny`), or in a library and larger than `MAX_LIBRARY_BYTES` (`large`);
    - marked as generated (`generated`), or mostly numbers or very long lines (`data`);
    - equal to an earlier document (`duplicate`), or to the held-out text or nearly so (`held_out`; see `HeldOutIndex`).
    A file that is itself a source is only checked for being text, and for the last line of this list. So are JSON
    lines, which may also be `empty`; a damaged line is an error.

    Args:
        sources: `"stdlib"`, names of installed distributions, paths of files or folders. If a name is both an
            installed distribution and a path, it means the distribution; a leading `./` makes it a path.
        held_out: documents that must not be trained on.
        chat: renders the conversations in JSON lines, from `chat.load_renderer`; None: there is no template.

    Returns:
        The corpus, the same for any order of `sources`.

    Raises:
        ValueError: a source is unknown, unreadable or empty; a JSON line is damaged; or every document was left out.
    """
    index = HeldOutIndex(held_out)
    documents, statistics, seen = [], {}, set()
    for source in sorted(set(sources)):
        left_out = collections.Counter()
        taken = []
        for document, reason in _read(source, chat):
            if not reason:
                digest = document.sha256
                if digest in seen:
                    reason = "duplicate"
                elif index.resembles(document):
                    reason = "held_out"
                seen.add(digest)
            if reason:
                left_out[reason] += 1
            else:
                taken.append(document)
        documents += taken
        num_bytes = sum(document.num_bytes for document in taken)
        statistics[source] = SourceStatistics(len(taken), num_bytes, dict(sorted(left_out.items())))
    if not documents:
        reasons = collections.Counter()
        for counts in statistics.values():
            reasons.update(counts.left_out)
        raise ValueError(
            f"no training text left in {', '.join(sorted(set(sources)))} ({left_out_in_words(reasons)}): name more "
            "sources in text.sources"
        )
    return Corpus(tuple(documents), statistics, _hash_documents(documents))


def _read(source: str, chat: jsonl.Chat | None) -> Found:
    """Yields the documents of a source in the order of files and lines."""
    why_not_library = functools.partial(why_not, library=True)
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        yield from read_files(root, walk(root, lambda name: name.endswith(".py")), source, chat, why_not_library)
    elif (distribution := distributions.find(source)) is not None:
        root = pathlib.Path(distribution.locate_file(""))
        relative = [pathlib.PurePosixPath(file) for file in distribution.files or ()]
        files = sorted(str(path) for path in relative if path.suffix == ".py" and ".." not in path.parts)
        if not files:
            raise ValueError(f"text.sources: the distribution {source!r} has no Python files; name its folder instead")
        yield from read_files(root, files, source, chat, why_not_library)
    else:
        if not source.strip():
            raise ValueError("text.sources: a source is empty; expected stdlib, a distribution, or a file or folder")
        if not is_file_or_folder(source):
            hint = distributions.did_you_mean(source, STDLIB)
            raise ValueError(f"text.sources: {source!r} is neither installed nor a file or folder{hint}")
        yield from read_path(source, chat, "text.sources", why_not)


def _hash_documents(documents: Iterable[Document]) -> str:
    total = hashlib.sha256()
    for document in documents:
        fields = [document.source, document.name, document.sha256, *[True] * document.special_tokens]
        total.update(json.dumps(fields).encode())
    return total.hexdigest()
