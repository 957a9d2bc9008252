"""Documents, and how they are read from files and folders."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from moe_jax.text import jsonl

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}


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

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def sha256(self) -> str:
        """Digest of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


Found = Iterator[tuple[Document | None, str]]  # a document, and the reason to leave it out ("": none)
WhyNot = Callable[[str, str], str]  # name and text -> the reason to leave a file out ("": none)


def is_file_or_folder(path: str) -> bool:
    """Whether a path exists and can be read as documents."""
    return os.path.isfile(path) or os.path.isdir(path)


def read_path(source: str, chat: jsonl.Chat | None, setting: str, why_not: WhyNot) -> Found:
    """Yields the documents of a file, or of all files of a folder that are not hidden.

    Args:
        source: the path.
        chat: renders the conversations in JSON lines; None: there is no template.
        setting: that named the path, for messages.
        why_not: judges files of a folder; a file that is itself the source is only checked for being text.

    Raises:
        ValueError: the file is not readable text, or a JSON line is damaged.
    """
    root = pathlib.Path(source)
    if root.is_dir():
        yield from read_files(root, walk(root, lambda name: not name.startswith(".")), source, chat, why_not)
    elif jsonl.is_jsonl(root.name):
        yield from _read_lines(root, source, root.name, chat)
    else:
        text, reason = _read_text(root)
        if reason:
            raise ValueError(f"{setting}: {source!r} is {reason}; expected a readable text file in UTF-8")
        yield Document(source, root.name, text), ""


def read_files(
    root: pathlib.Path, names: Iterable[str], source: str, chat: jsonl.Chat | None, why_not: WhyNot
) -> Found:
    """Yields the documents of files in a folder, in the order of `names`; see `read_path`."""
    for name in names:
        if jsonl.is_jsonl(name):
            yield from _read_lines(root / name, source, name, chat)
            continue
        text, reason = _read_text(root / name)
        reason = reason or why_not(name, text)
        yield (None, reason) if reason else (Document(source, name, text), "")


def _read_lines(path: pathlib.Path, source: str, name: str, chat: jsonl.Chat | None) -> Found:
    for line in jsonl.read_lines(path, chat):
        document = Document(source, f"{name}:{line.number}", line.text, line.special_tokens)
        yield (document, "") if line.text.strip() else (None, "empty")


def walk(root: pathlib.Path, is_text: Callable[[str], bool]) -> list[str]:
    """The sorted paths in a folder of files whose name is accepted, outside hidden folders and installed packages."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
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


def left_out_in_words(reasons: Mapping[str, int]) -> str:
    """How many documents were left out, by reason."""
    counts = [f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(reasons.items())]
    return f"left out: {', '.join(counts) or 'nothing'}"
