"""The held-out text: an archive that is verified against its manifest, or any file or folder."""

import collections
import json
import lzma
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from moe_jax.text import jsonl
from moe_jax.text.documents import Document, is_file_or_folder, left_out_in_words, read_path

ARCHIVE = "held_out.jsonl.xz"
MANIFEST = "MANIFEST.json"


class HeldOut(NamedTuple):
    """Held-out documents and their tokens."""

    documents: Sequence[Document]
    tokens: Sequence[np.ndarray]  # int32, of each document

    @property
    def bytes_J(self) -> np.ndarray:
        """Bytes of each document, int64."""
        return np.array([document.num_bytes for document in self.documents], np.int64)

    def first_bytes(self, num_bytes: int) -> "HeldOut":
        """The first documents that together reach `num_bytes`; all if they have fewer."""
        count = int(np.searchsorted(np.cumsum(self.bytes_J), num_bytes)) + 1
        return HeldOut(self.documents[:count], self.tokens[:count])


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
    if not is_file_or_folder(source):
        raise ValueError(f"text.held_out = {source!r}: expected a file or folder")
    if (pathlib.Path(path) / MANIFEST).is_file():
        return _load_archive(pathlib.Path(path))
    documents, left_out = [], collections.Counter()
    for document, reason in read_path(source, chat, "text.held_out", lambda name, text: ""):
        if reason == "unreadable":
            raise ValueError(f"text.held_out: a file in {source!r} is unreadable: what it holds cannot be held out")
        if not reason and document.text.strip():
            documents.append(document)
        else:
            left_out[reason or "empty"] += 1
    if not documents:
        raise ValueError(f"text.held_out: no text in {source!r} ({left_out_in_words(left_out)})")
    if left_out:
        logging.warning("held-out text in %s: %s", source, left_out_in_words(left_out))
    return tuple(documents)


def _load_archive(folder: pathlib.Path) -> tuple[Document, ...]:
    damaged = f"{folder / ARCHIVE} is damaged or not the one of {MANIFEST}; restore both from the repository"
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        with lzma.open(folder / ARCHIVE, "rt", encoding="utf-8") as lines:
            documents = tuple(Document(**json.loads(line)) for line in lines)
        names_and_digests = [(document.source, document.name, document.sha256) for document in documents]
        described = [(entry["source"], entry["name"], entry["sha256"]) for entry in entries]
    except FileNotFoundError as error:
        raise ValueError(f"held-out text: {error.filename} is missing (text.held_out names the folder)") from error
    except OSError as error:
        raise ValueError(f"held-out text in {folder} is unreadable: {error}") from error
    except (lzma.LZMAError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(damaged) from error
    if names_and_digests != described:
        raise ValueError(damaged)
    return documents


def half(documents: Sequence[Document], which: str) -> tuple[Document, ...]:
    """Every second document: "even" ones, counted from 0, or "odd" ones; "": all."""
    return tuple(documents[{"": 0, "even": 0, "odd": 1}[which] :: 2 if which else 1])
