"""Shingles: hashes of sequences of consecutive words, for finding near-duplicates.

Broder, "On the resemblance and containment of documents", 1997.
"""

import string

import numpy as np

SHINGLE_WORDS = 8  # consecutive words: about a line and a half of Python
_SHINGLED_AT_ONCE = 4_000_000  # characters


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
