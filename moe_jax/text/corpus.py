"""The training text: files that are already on the machine, without the held-out text.

A source is `"stdlib"` (the running interpreter's standard library), the name of an installed, permissively licensed
distribution, or the path of a file or folder. A file is a document, except JSON lines (`jsonl.py`), in which each line
is one. Left out are files that were not written by hand (generated tables, recorded data) and near-duplicates of the
held-out text, found by comparing shingles, that is, sequences of consecutive words (`shingles.py`).
"""

import collections
import dataclasses
import hashlib
import json
import lzma
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from moe_jax.text import distributions, jsonl
from moe_jax.text.shingles import shingle

CONTAINMENT_THRESHOLD = 0.25  # share of a document's shingles in the other one that makes a near-duplicate
BOILERPLATE_FILES = 4  # shingles in this many held-out files (licence headers) are not compared
MIN_BYTES = 200  # smaller files are left out
MAX_LIBRARY_BYTES = 512 * 1024  # larger library files are left out: most are generated
MAX_LINE_CHARACTERS = 1000  # a file with longer lines was not written by hand
MAX_DATA_FRACTION = 0.25  # share of characters in numbers, escapes and unbroken ASCII runs of 80 or more

STDLIB = "stdlib"
ARCHIVE = "held_out.jsonl.xz"
MANIFEST = "MANIFEST.json"

_GENERATED = re.compile(
    r"auto-?\s?generated|automatically generated|file (?:is|was) generated|^\W*(?:file )?generated (?:by|from)"
    r"|generated from ['\"]|do(?: not|n't) (?:manually )?edit",
    re.IGNORECASE | re.MULTILINE,
)
_GENERATED_NAMES = re.compile(r"(_pb2|_pb2_grpc)\.py$|(^|/)(_sysconfigdata\w*|_version)\.py$")
_DATA = re.compile(r"0[xX][0-9a-fA-F]+|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|[-+]?\d[\d_.]*(?:[eE][-+]?\d+)?|[!-~]{80,}")
_NOT_LIBRARY_CODE = {"__pycache__", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One file, or one line of a file of JSON lines.

    Attributes:
        source: the source it was read from.
        name: its path within the source; for a line, followed by `:` and the line's number.
        text: the whole text.
        special_tokens: whether special tokens in the text are encoded as such, as in a conversation rendered by a chat
            template; if not, their characters are ordinary text.
    """

    source: str
    name: str
    text: str
    special_tokens: bool = False


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
        ValueError: a source is unknown, not permissively licensed, unreadable or empty; a JSON line is damaged; or
            every document was left out.
    """
    index = HeldOutIndex(held_out)
    documents, statistics, seen = [], {}, set()
    for source in sorted(set(sources)):
        left_out = collections.Counter()
        taken = []
        for document, reason in _read(source, chat):
            if not reason:
                digest = hashlib.sha256(document.text.encode()).digest()
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
        num_bytes = sum(len(document.text.encode()) for document in taken)
        statistics[source] = SourceStatistics(len(taken), num_bytes, dict(sorted(left_out.items())))
    if not documents:
        reasons = sum((collections.Counter(one.left_out) for one in statistics.values()), collections.Counter())
        raise ValueError(
            f"no training text left in {', '.join(sorted(set(sources)))} ({_left_out(reasons)}): name more sources in "
            "text.sources"
        )
    return Corpus(tuple(documents), statistics, _hash_documents(documents))


def load_held_out(path: str | os.PathLike, chat: jsonl.Chat | None = None) -> tuple[Document, ...]:
    """Reads the held-out text: the archive in a folder that has `MANIFEST.json`, or any file or folder.

    The archive, `held_out.jsonl.xz`, is verified against the manifest. From any other folder all files that are not
    hidden are read. Only files that are not UTF-8 text and empty documents are left out.

    Args:
        path: a file, such as text or JSON lines, or a folder.
        chat: as in `collect`.

    Returns:
        The held-out documents, in the manifest's order or by name.

    Raises:
        ValueError: there is no text, a file is unreadable, a JSON line is damaged, or the archive is missing, damaged
            or not the one that the manifest describes.
    """
    source = str(path)
    if not _is_file_or_folder(source):
        raise ValueError(f"text.held_out = {source!r}: expected a file or folder")
    if (pathlib.Path(path) / MANIFEST).is_file():
        return _load_archive(pathlib.Path(path))
    documents, left_out = [], collections.Counter()
    for document, reason in _read_path(source, chat, "text.held_out", lambda name, text: ""):
        if reason == "unreadable":
            raise ValueError(f"text.held_out: a file in {source!r} is unreadable: what it holds cannot be held out")
        if not reason and document.text.strip():
            documents.append(document)
        else:
            left_out[reason or "empty"] += 1
    if not documents:
        raise ValueError(f"text.held_out: no text in {source!r} ({_left_out(left_out)})")
    if left_out:
        logging.warning("held-out text in %s: %s", source, _left_out(left_out))
    return tuple(documents)


def _load_archive(folder: pathlib.Path) -> tuple[Document, ...]:
    damaged = f"{folder / ARCHIVE} is damaged or not the one of {MANIFEST}; restore both from the repository"
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        with lzma.open(folder / ARCHIVE, "rt", encoding="utf-8") as lines:
            documents = tuple(Document(**json.loads(line)) for line in lines)
        found = [(document.source, document.name, _sha256(document.text)) for document in documents]
        described = [(entry["source"], entry["name"], entry["sha256"]) for entry in entries]
    except FileNotFoundError as error:
        raise ValueError(f"held-out text: {error.filename} is missing (text.held_out names the folder)") from error
    except OSError as error:
        raise ValueError(f"held-out text in {folder} is unreadable: {error}") from error
    except (lzma.LZMAError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(damaged) from error
    if found != described:
        raise ValueError(damaged)
    return documents


def half(documents: Sequence[Document], which: str) -> tuple[Document, ...]:
    """Every second document: "even" ones, counted from 0, or "odd" ones; "": all."""
    return tuple(documents[{"": 0, "even": 0, "odd": 1}[which] :: 2 if which else 1])


class HeldOutIndex:
    """Finds near-duplicates of held-out documents.

    A document resembles the held-out text if it has the source and name of a held-out document (any version of it) or
    its text, if `CONTAINMENT_THRESHOLD` of its shingles occur in held-out documents, or if it contains that share of
    the shingles of one held-out document. Shingles in `BOILERPLATE_FILES` or more held-out texts do not count.
    """

    def __init__(self, held_out: Sequence[Document]):
        self._names = {_key(document) for document in held_out}
        self._texts = {document.text for document in held_out}
        shingles = [shingle(text) for text in dict.fromkeys(document.text for document in held_out)]
        hashes = np.concatenate([np.zeros(0, np.uint64), *shingles])
        owners = np.repeat(np.arange(len(shingles)), [len(one) for one in shingles])
        unique, inverse, files = np.unique(hashes, return_inverse=True, return_counts=True)
        self._boilerplate = unique[files >= BOILERPLATE_FILES]
        telling = files[inverse] < BOILERPLATE_FILES
        order = np.argsort(hashes[telling], kind="stable")
        self._hashes = hashes[telling][order]
        self._owners = owners[telling][order]
        self._sizes = np.maximum(np.bincount(self._owners, minlength=len(shingles)), 1)

    def resembles(self, document: Document) -> bool:
        """Whether the document is held out, or nearly the same as one that is."""
        if _key(document) in self._names or document.text in self._texts:
            return True
        return self.containment(document.text) >= CONTAINMENT_THRESHOLD

    def containment(self, text: str) -> float:
        """The larger of two shares: of `text` in all held-out documents, or of one held-out document in `text`."""
        if not len(self._hashes):
            return 0.0
        hashes = shingle(text)
        hashes = hashes[~_is_in(hashes, self._boilerplate)]
        shared = hashes[_is_in(hashes, self._hashes)]
        if not len(shared):
            return 0.0
        # a shingle may have up to BOILERPLATE_FILES - 1 owners, which lie next to one another
        first, last = np.searchsorted(self._hashes, shared, "left"), np.searchsorted(self._hashes, shared, "right")
        owners = np.concatenate(
            [self._owners[first + step][first + step < last] for step in range((last - first).max())]
        )
        share_of_each = np.bincount(owners, minlength=len(self._sizes)) / self._sizes
        return float(max(len(shared) / len(hashes), share_of_each.max()))


def _is_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), bool)
    position = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[position] == values


_Read = Iterator[tuple[Document | None, str]]  # a document, and the reason to leave it out ("": none)


def _read(source: str, chat: jsonl.Chat | None) -> _Read:
    """Yields the documents of a source in the order of files and lines."""
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        yield from _read_files(root, _walk(root, lambda name: name.endswith(".py")), source, chat, _why_not_library)
    elif (distribution := distributions.find(source)) is not None:
        distributions.require_permissive(distribution)
        root = pathlib.Path(distribution.locate_file(""))
        relative = [pathlib.PurePosixPath(file) for file in distribution.files or ()]
        files = sorted(str(path) for path in relative if path.suffix == ".py" and ".." not in path.parts)
        if not files:
            raise ValueError(f"text.sources: the distribution {source!r} has no Python files; name its folder instead")
        yield from _read_files(root, files, source, chat, _why_not_library)
    else:
        if not source.strip():
            raise ValueError("text.sources: a source is empty; expected stdlib, a distribution, or a file or folder")
        if not _is_file_or_folder(source):
            hint = distributions.did_you_mean(source, STDLIB)
            raise ValueError(f"text.sources: {source!r} is neither installed nor a file or folder{hint}")
        yield from _read_path(source, chat, "text.sources", _why_not)


def _is_file_or_folder(path: str) -> bool:
    return os.path.isfile(path) or os.path.isdir(path)


def _read_path(source: str, chat: jsonl.Chat | None, setting: str, why_not: Callable[[str, str], str]) -> _Read:
    root = pathlib.Path(source)
    if root.is_dir():
        yield from _read_files(root, _walk(root, lambda name: not name.startswith(".")), source, chat, why_not)
    elif jsonl.is_jsonl(root.name):
        yield from _read_lines(root, source, root.name, chat)
    else:
        text, reason = _read_text(root)
        if reason:
            raise ValueError(f"{setting}: {source!r} is {reason}; expected a readable text file in UTF-8")
        yield Document(source, root.name, text), ""


def _read_files(
    root: pathlib.Path, names: Iterable[str], source: str, chat: jsonl.Chat | None, why_not: Callable[[str, str], str]
) -> _Read:
    for name in names:
        if jsonl.is_jsonl(name):
            yield from _read_lines(root / name, source, name, chat)
            continue
        text, reason = _read_text(root / name)
        reason = reason or why_not(name, text)
        yield (None, reason) if reason else (Document(source, name, text), "")


def _read_lines(path: pathlib.Path, source: str, name: str, chat: jsonl.Chat | None) -> _Read:
    for line in jsonl.read_lines(path, chat):
        document = Document(source, f"{name}:{line.number}", line.text, line.special_tokens)
        yield (document, "") if line.text.strip() else (None, "empty")


def _walk(root: pathlib.Path, is_text: Callable[[str], bool]) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY_CODE and not name.startswith(".")]
        paths = [pathlib.Path(folder) / name for name in files if is_text(name)]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]  # no pipes or sockets
    return sorted(names)


def _read_text(path: pathlib.Path) -> tuple[str, str]:
    try:
        data = path.read_bytes()
        text = data.decode()
    except OSError:
        return "", "unreadable"
    except UnicodeDecodeError:
        return "", "binary"
    return ("", "binary") if b"\0" in data else (text, "")


def _why_not(name: str, text: str, library: bool = False) -> str:
    num_bytes = len(text.encode())
    if num_bytes < MIN_BYTES:
        return "tiny"
    if library and num_bytes > MAX_LIBRARY_BYTES:
        return "large"
    if _GENERATED_NAMES.search(name) or _GENERATED.search(text[:1000]):
        return "generated"
    if max(map(len, text.split("\n"))) > MAX_LINE_CHARACTERS and (library or name.endswith(".py")):
        return "data"
    in_data = sum(match.end() - match.start() for match in _DATA.finditer(text))
    return "data" if in_data > MAX_DATA_FRACTION * len(text) else ""


def _why_not_library(name: str, text: str) -> str:
    return _why_not(name, text, library=True)


def _left_out(reasons: Mapping[str, int]) -> str:
    counts = [f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(reasons.items())]
    return f"left out: {', '.join(counts) or 'nothing'}"


def _key(document: Document) -> tuple[str, str]:
    """Source and name; the source normalised like a package name: "Orbax_Checkpoint" is "orbax-checkpoint"."""
    return re.sub(r"[-_.]+", "-", document.source).lower(), document.name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_documents(documents: Iterable[Document]) -> str:
    total = hashlib.sha256()
    for document in documents:
        fields = [document.source, document.name, _sha256(document.text), *[True] * document.special_tokens]
        total.update(json.dumps(fields).encode())
    return total.hexdigest()
