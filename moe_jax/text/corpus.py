"""The training text: real source files that are already on the machine, less everything that was held out.

A source is `"stdlib"` (the running interpreter's standard library), the name of an installed, permissively licensed
distribution, or the path of a file or folder. Files that nobody wrote by hand (generated tables, recorded data) are
left out, and so is whatever resembles the held-out text: two documents are compared by their shingles, sequences of
consecutive words (`shingles.py`).
"""

import collections
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import lzma
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moe_jax.text.shingles import shingle

CONTAINMENT_THRESHOLD = 0.25  # of either document's shingles found in the other: a near-duplicate
BOILERPLATE_FILES = 4  # a shingle in so many held-out files (a licence header) says nothing about resemblance
MIN_BYTES = 200  # smaller files are left out
MAX_LIBRARY_BYTES = 512 * 1024  # larger files of libraries are left out: most are generated
MAX_LINE_CHARACTERS = 1000  # a longer line was not typed
MAX_DATA_FRACTION = 0.25  # of the characters in numbers, escapes and unbroken ASCII runs of 80 and more

STDLIB = "stdlib"
ARCHIVE = "held_out.jsonl.xz"
MANIFEST = "MANIFEST.json"

PERMISSIVE = frozenset(
    ("MIT", "MIT-0", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "PSF-2.0", "Python-2.0")
    + ("ISC", "HPND", "Zlib", "Unlicense", "CC0-1.0")
)
_PERMISSIVE_WORDS = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|Python Software Foundation|PSF|ISC|Historical Permission Notice|HPND|zlib|Unlicense"
    r"|CC0)\b",
    re.IGNORECASE,
)
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
    """One file: where it comes from, its path within that source, and its whole text."""

    source: str
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """What was taken from one source, and how many files were left out, by reason."""

    files: int
    bytes: int  # of UTF-8
    left_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training documents, ordered by source and name.

    Attributes:
      documents: the documents.
      statistics: of each source, under the name it was asked for by.
      sha256: of all sources, names and texts: a resumed run compares it.
    """

    documents: tuple[Document, ...]
    statistics: Mapping[str, SourceStatistics]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8, all documents together."""
        return sum(statistics.bytes for statistics in self.statistics.values())


def collect(sources: Sequence[str], held_out: Sequence[Document]) -> Corpus:
    """Reads every source and leaves out what is not worth learning or must not be learned.

    Only `.py` files are read of the standard library and of distributions, every file of a folder, except hidden ones.
    Left out, and counted by reason: files that are not UTF-8 text (`binary`) or `unreadable`, smaller than `MIN_BYTES`
    (`tiny`), of a library and larger than `MAX_LIBRARY_BYTES` (`large`), that say they are generated (`generated`),
    numbers in the main or with very long lines (`data`), seen before, byte for byte (`duplicate`), and held out or
    nearly so (`held_out`; see `HeldOutIndex`). A file named itself is only checked for being text and for the last two.

    Args:
      sources: `"stdlib"`, names of installed distributions, paths of files or folders. A name that is both an
        installed distribution and a path means the distribution; a leading `./` makes it a path.
      held_out: documents that must not be trained on.

    Returns:
      The corpus, the same for any order of `sources`.

    Raises:
      ValueError: a source is unknown, not permissively licensed, unreadable or has nothing to read; or nothing is left.
    """
    index = HeldOutIndex(held_out)
    documents, statistics, seen = [], {}, set()
    for source in sorted(set(sources)):
        left_out = collections.Counter()
        taken = []
        for document, reason in _read(source):
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
        raise ValueError(
            f"no training text left in {', '.join(sorted(set(sources)))}: name more sources in text.sources"
        )
    return Corpus(tuple(documents), statistics, _hash_documents(documents))


def load_held_out(folder: str | os.PathLike) -> tuple[Document, ...]:
    """Reads the held-out archive and verifies it against its manifest.

    Args:
      folder: holds `held_out.jsonl.xz` and `MANIFEST.json`.

    Returns:
      The held-out documents in the manifest's order.

    Raises:
      ValueError: a file is missing, or the archive is damaged or not the one that the manifest describes.
    """
    folder = pathlib.Path(folder)
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


class HeldOutIndex:
    """Tells near-duplicates of held-out documents.

    A document resembles the held-out text when it has the source and name of a held-out document (any version of it),
    when `CONTAINMENT_THRESHOLD` of its shingles occur in held-out documents, or when it contains that share of the
    shingles of one held-out document. Shingles of `BOILERPLATE_FILES` held-out documents or more do not count.
    """

    def __init__(self, held_out: Sequence[Document]):
        self._names = {_key(document) for document in held_out}
        shingles = [shingle(document.text) for document in held_out]
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
        """Whether the document is held out, or nearly so."""
        if _key(document) in self._names:
            return True
        return self.containment(document.text) >= CONTAINMENT_THRESHOLD

    def containment(self, text: str) -> float:
        """The larger of two shares: of `text` in all held-out documents, of any one held-out document in `text`."""
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
        of_one = np.bincount(owners, minlength=len(self._sizes)) / self._sizes
        return float(max(len(shared) / len(hashes), of_one.max()))


def _is_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), bool)
    position = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[position] == values


def _read(source: str) -> Iterable[tuple[Document | None, str]]:
    """Yields each file of a source in order of name: the document, and why it is left out ("" if it is not)."""
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files, library = _walk(root, lambda name: name.endswith(".py")), True
    elif (distribution := _distribution(source)) is not None:
        _require_permissive(distribution)
        root = pathlib.Path(distribution.locate_file(""))
        relative = [pathlib.PurePosixPath(file) for file in distribution.files or ()]
        files = sorted(str(path) for path in relative if path.suffix == ".py" and ".." not in path.parts)
        library = True
        if not files:
            raise ValueError(f"text.sources: the distribution {source!r} has no Python files; name its folder instead")
    else:
        root, library = pathlib.Path(source), False
        if not source.strip():
            raise ValueError("text.sources: a source is empty; wanted stdlib, a distribution, or a file or folder")
        if root.is_file():
            yield _read_named_file(root, source), ""
            return
        if not root.is_dir():
            raise ValueError(f"text.sources: {source!r} is neither installed nor a file or folder{_nearest(source)}")
        files = _walk(root, lambda name: not name.startswith("."))
    for name in files:
        text, reason = _read_text(root / name)
        reason = reason or _why_not(name, text, library)
        yield (None, reason) if reason else (Document(source, name, text), "")


def _walk(root: pathlib.Path, wanted: Callable[[str], bool]) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY_CODE and not name.startswith(".")]
        paths = [pathlib.Path(folder) / name for name in files if wanted(name)]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]  # no pipes or sockets
    return sorted(names)


def _read_named_file(path: pathlib.Path, source: str) -> Document:
    text, reason = _read_text(path)
    if reason:
        raise ValueError(f"text.sources: {source!r} is {reason}; wanted a readable text file in UTF-8")
    return Document(source, path.name, text)


def _read_text(path: pathlib.Path) -> tuple[str, str]:
    try:
        data = path.read_bytes()
        text = data.decode()
    except OSError:
        return "", "unreadable"
    except UnicodeDecodeError:
        return "", "binary"
    return ("", "binary") if b"\0" in data else (text, "")


def _why_not(name: str, text: str, library: bool) -> str:
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


def _distribution(source: str) -> importlib.metadata.Distribution | None:
    if not re.fullmatch(r"[A-Za-z0-9]+([._-]+[A-Za-z0-9]+)*", source):
        return None
    try:
        return importlib.metadata.distribution(source)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nearest(source: str) -> str:
    names = sorted({name for one in importlib.metadata.distributions() if (name := one.metadata["Name"])})
    near = difflib.get_close_matches(source, [STDLIB, *names], n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _require_permissive(distribution: importlib.metadata.Distribution) -> None:
    metadata = distribution.metadata
    expression = metadata.get("License-Expression")
    classifiers = [
        one for one in metadata.get_all("Classifier") or () if re.match("License :: .* ::|License :: (?!OSI)", one)
    ]
    written = (metadata.get("License") or "").strip()[:200]
    if expression:
        permissive, licence = _is_permissive_expression(expression), expression
    elif classifiers:
        # every classifier, because nothing says which of them holds for which file
        permissive = all(_PERMISSIVE_WORDS.search(one) for one in classifiers)
        licence = ", ".join(one.removeprefix("License :: ") for one in classifiers)
    else:
        copyleft = re.search(r"\b(A?L?GPL|MPL|GNU|Mozilla)", written)
        permissive, licence = bool(_PERMISSIVE_WORDS.search(written)) and not copyleft, written.split("\n")[0]
    if not permissive:
        raise ValueError(
            f"text.sources: the licence of {metadata['Name']!r} is {licence or 'not stated'!r}; wanted a permissive "
            "one (MIT, BSD, Apache-2.0, PSF, ISC, HPND, Zlib, 0BSD, CC0, Unlicense)"
        )


def _is_permissive_expression(expression: str) -> bool:
    """An SPDX expression: every part joined by AND, one of those joined by OR."""
    for part in re.split(r"\s+AND\s+", re.sub(r"[()]", " ", expression), flags=re.IGNORECASE):
        choices = re.split(r"\s+OR\s+", part.strip(), flags=re.IGNORECASE)
        if not any(re.split(r"\s+WITH\s+", choice)[0].strip() in PERMISSIVE for choice in choices):
            return False
    return True


def _key(document: Document) -> tuple[str, str]:
    """Source and name, the source as package indexes compare it: "Orbax_Checkpoint" is "orbax-checkpoint"."""
    return re.sub(r"[-_.]+", "-", document.source).lower(), document.name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_documents(documents: Iterable[Document]) -> str:
    total = hashlib.sha256()
    for document in documents:
        total.update(json.dumps([document.source, document.name, _sha256(document.text)]).encode())
    return total.hexdigest()
