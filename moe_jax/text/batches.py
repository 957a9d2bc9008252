"""Batches of documents: packed into rows for training, or cut into overlapping windows for scoring.

A document's tokens begin with `<|endoftext|>`, which is also the label of its last token. The document is cut into
pieces of T tokens, one row each; the shorter last pieces share rows. A segment id per token keeps the pieces of a row
apart: attention and positions never cross from one document to another.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from moe_jax.text.tokenizer import END_OF_TEXT_ID

_EPOCHS = 2**32  # in effect endless; grain's own endless repetition overflows at batch size 1


class Batch(NamedTuple):
    """A batch of rows, or one row without the axis B; all int32, padded with 0."""

    tokens_BT: np.ndarray
    labels_BT: np.ndarray  # the next token of the document; `<|endoftext|>` after the last one
    segments_BT: np.ndarray  # 1, 2, .. for the pieces of a row; 0 is padding, which is not trained on
    positions_BT: np.ndarray  # from 0 in each piece


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """Rows of pieces of documents, built on demand.

    Attributes:
        tokens: all documents, concatenated, and a closing `<|endoftext|>`, int32.
        starts: index in `tokens` of the first token of each piece, int64, in order of rows.
        lengths: tokens of each piece.
        first_piece: index of each row's first piece, and at the end the number of pieces.
        sequence_length: T.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first_piece: np.ndarray
    sequence_length: int

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.first_piece) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, without padding."""
        return int(self.lengths.sum())

    @property
    def fill_fraction(self) -> float:
        """Share of the rows that is not padding."""
        return self.num_tokens / (self.num_rows * self.sequence_length)

    def row(self, index: int) -> Batch:
        """Builds one row: four arrays `[T]`."""
        row = Batch(*(np.zeros(self.sequence_length, np.int32) for _ in Batch._fields))
        place = 0
        pieces = range(self.first_piece[index], self.first_piece[index + 1])
        for segment, piece in enumerate(pieces, start=1):
            start, length = self.starts[piece], self.lengths[piece]
            filled = slice(place, place + length)
            row.tokens_BT[filled] = self.tokens[start : start + length]
            row.labels_BT[filled] = self.tokens[start + 1 : start + length + 1]
            row.segments_BT[filled] = segment
            row.positions_BT[filled] = np.arange(length)
            place += length
        return row


def pack(
    token_arrays: Sequence[np.ndarray],
    sequence_length: int,
    end_of_text: int = END_OF_TEXT_ID,
    closed: bool = False,
) -> Packed:
    """Cuts documents into pieces and packs the pieces into rows.

    Pieces shorter than T are packed by best-fit decreasing: the longest first, each into the fullest row that still has
    room for it. The result depends on the lengths alone.

    Args:
        token_arrays: one int32 array per document, beginning with `<|endoftext|>`, from `encode_documents`.
        sequence_length: T.
        end_of_text: the id of `<|endoftext|>`, or of the token that another tokenizer puts before a text.
        closed: whether each document's last token ends it, and is thus only a label: nothing is predicted after it.

    Returns:
        Rows that hold every token of every document exactly once; if `closed`, all but its last.

    Raises:
        ValueError: no documents, `sequence_length` is not positive, or a document does not begin with `<|endoftext|>`.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length = {sequence_length}: expected 1 or more")
    for tokens in token_arrays:
        if not len(tokens) or tokens[0] != end_of_text:
            raise ValueError(f"a document does not begin with the end-of-text token (id {end_of_text})")
    rows, tails, begin = [], [], 0
    for tokens in token_arrays:
        end = begin + len(tokens) - closed
        for start in range(begin, end, sequence_length):
            length = min(sequence_length, end - start)
            if length == sequence_length:
                rows.append([(start, length)])
            else:
                tails.append((start, length))
        begin += len(tokens)
    rows += _best_fit_decreasing(tails, sequence_length)
    if not rows:
        raise ValueError("no documents to pack")
    pieces = np.array([piece for row in rows for piece in row], np.int64)
    closing = np.array([end_of_text], np.int32)
    return Packed(
        tokens=np.concatenate([*token_arrays, closing]).astype(np.int32),
        starts=pieces[:, 0],
        lengths=pieces[:, 1],
        first_piece=np.cumsum([0] + [len(row) for row in rows]),
        sequence_length=sequence_length,
    )


def _best_fit_decreasing(tails: list[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    rows, by_room = [], []  # by_room: (room left, row), ascending
    for start, length in sorted(tails, key=lambda tail: (-tail[1], tail[0])):
        place = bisect.bisect_left(by_room, (length, 0))
        if place < len(by_room):
            left, row = by_room.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append((start, length))
        if left > length:
            bisect.insort(by_room, (left - length, row))
    return rows


def batches(packed: Packed, batch_size: int, seed: int) -> grain.IterDataset:
    """An endless stream of batches, reshuffled every epoch.

    Batch s depends on the rows, the seed and s alone. `iter()` returns a `grain.DatasetIterator`; to resume after s
    batches, pass its `get_state()` to `set_state()` of a new one. An epoch may end within a batch; no row is dropped.

    Args:
        packed: at least one row.
        batch_size: B.
        seed: of the order of rows, 0 to 2**32 - 1.

    Returns:
        A dataset of `Batch` with arrays `[B, T]`, int32.
    """
    rows = grain.MapDataset.range(packed.num_rows).seed(seed).shuffle().repeat(_EPOCHS).map(packed.row)
    # No threads: a batch takes less than a millisecond, and an interrupted run leaves nothing running.
    return rows.batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def windows(tokens: np.ndarray, context: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts one document into overlapping windows in which each token after the first is scored once.

    The first window scores all its labels, every later one its last `stride` labels, so that each has at least
    `context - stride` tokens before it, or all that there are. Nothing is predicted after its last token.

    Args:
        tokens: one document, int32; its first token (`<|endoftext|>`) is not scored.
        context: T, tokens per window.
        stride: new labels per window, 1 to `context`.

    Returns:
        Arrays `[N, T]` for N windows: tokens and labels, int32, padded with 0 at the end, and whether a label is
        scored, bool. N is 0 for a document of fewer than two tokens.

    Raises:
        ValueError: `stride` is not between 1 and `context`.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride = {stride}: expected 1 to the context of {context} tokens")
    num_labels = max(len(tokens) - 1, 0)
    count = 0 if num_labels == 0 else 1 + max(0, -(-(num_labels - context) // stride))
    tokens_NT = np.zeros((count, context), np.int32)
    labels_NT = np.zeros((count, context), np.int32)
    scored_NT = np.zeros((count, context), bool)
    for window in range(count):
        start = window * stride
        length = min(context, num_labels - start)
        tokens_NT[window, :length] = tokens[start : start + length]
        labels_NT[window, :length] = tokens[start + 1 : start + length + 1]
        scored_NT[window, (context - stride if window else 0) : length] = True
    return tokens_NT, labels_NT, scored_NT
