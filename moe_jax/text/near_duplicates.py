"""Finds near-duplicates of the held-out text by shingles: hashes of sequences of consecutive words.

Broder, "On the resemblance and containment of documents", 1997.
"""

import re
import string
from collections.abc import Sequence

import numpy as np

from moe_jax.text.documents import Document

CONTAINMENT_THRESHOLD = 0.25  # share of a document's shingles in the other one that makes a near-duplicate
BOILERPLATE_FILES = 4  # shingles in this many held-out files (licence headers) are not compared
SHINGLE_WORDS = 8  # consecutive words: about a line and a half of Python
_SHINGLED_AT_ONCE = 4_000_000  # characters


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
        owners = np.repeat(np.arange(len(shingles)), list(map(len, shingles)))
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


def _key(document: Document) -> tuple[str, str]:
    """Source and name; the source normalised like a package name: "Orbax_Checkpoint" is "orbax-checkpoint"."""
    return re.sub(r"[-_.]+", "-", document.source).lower(), document.name


def shingle(text: str) -> np.ndarray:
    """Hashes every sequence of `SHINGLE_WORDS` consecutive words; a shorter text is one shingle.

    A word is a run of ASCII letters, digits and underscores, or one character beyond ASCII; all else separates words.

    Returns:
        The distinct hashes in ascending order, uint64, the same on every machine.
    """
    if len(text) > _SHINGLED_AT_ONCE:
        blocks = range(0, len(text), _SHINGLED_AT_ONCE)
        return np.unique(np.concatenate([shingle(text[block : block + _SHINGLED_AT_ONCE]) for block in blocks]))
    words = _hash_words(text)
    if not len(words):
        return words
    width = min(SHINGLE_WORDS, len(words))
    hashes = np.zeros(len(words) - width + 1, np.uint64)
    for offset in range(width):
        hashes = _mix(hashes + words[offset : offset + len(hashes)])
    return np.unique(hashes)


def _hash_words(text: str) -> np.ndarray:
    """A hash of each word, in order: its bytes read as the digits of a number in an odd base, modulo 2**64."""
    data = np.frombuffer(text.encode(), np.uint8)
    kind = _BYTE_KIND[data]
    before = np.concatenate([[0], kind[:-1]]) if len(kind) else kind
    begins = (kind == _LEAD) | ((kind == _LETTER) & (before != _LETTER))
    in_word = np.flatnonzero(kind)
    starts = np.flatnonzero(begins[in_word])
    if not len(starts):
        return np.zeros(0, np.uint64)
    lengths = np.diff(np.append(starts, len(in_word)))
    places = np.arange(len(in_word)) - np.repeat(starts, lengths)
    powers = np.full(lengths.max(), _BASE, np.uint64)
    np.multiply.accumulate(powers, out=powers)
    return _mix(np.add.reduceat((data[in_word] + np.uint64(1)) * powers[places], starts))


_BASE = 0x9E3779B97F4A7C15
_LETTER, _LEAD, _TAIL = 1, 2, 3  # a byte of an ASCII word; the first or another byte of a character beyond ASCII


def _byte_kinds() -> np.ndarray:
    kinds = np.zeros(256, np.uint8)
    kinds[np.frombuffer((string.ascii_letters + string.digits + "_").encode(), np.uint8)] = _LETTER
    kinds[128:192] = _TAIL
    kinds[192:] = _LEAD
    return kinds


_BYTE_KIND = _byte_kinds()


def _mix(hashes: np.ndarray) -> np.ndarray:
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(29))
