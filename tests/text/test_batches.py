"""Packing keeps every token and separates documents; a resumed stream continues as if it had not stopped."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.text.batches import Batch, batches, pack, windows
from moe_jax.text.tokenizer import END_OF_TEXT_ID

documents_of_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def make_documents(lengths):
    """Documents in which each token is unique, except the one at the beginning."""
    arrays, following = [], 1
    for length in lengths:
        arrays.append(np.array([END_OF_TEXT_ID, *range(following, following + length - 1)], np.int32))
        following += length - 1
    return arrays


def all_rows(packed):
    rows = [packed.row(index) for index in range(packed.num_rows)]
    return Batch(*(np.stack(arrays) for arrays in zip(*rows)))


@hypothesis.given(documents_of_lengths, st.integers(1, 17))
@hypothesis.settings(deadline=None, max_examples=80)
def test_every_token_is_packed_once_with_its_label(lengths, sequence_length):
    documents = make_documents(lengths)
    packed = pack(documents, sequence_length)
    rows = all_rows(packed)
    pieces = []
    for tokens, labels, segments, positions in zip(*rows):
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(here, np.arange(here[0], here[-1] + 1))
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            pieces.append((tokens[here].tolist(), labels[here].tolist()))
    expected = []
    for document in documents:
        labels = [*document[1:].tolist(), END_OF_TEXT_ID]
        for start in range(0, len(document), sequence_length):
            cut = slice(start, start + sequence_length)
            expected.append((document[cut].tolist(), labels[cut]))
    assert sorted(pieces) == sorted(expected)
    padding = rows.segments_BT == 0
    for array in rows:
        assert array.dtype == np.int32
        assert not array[padding].any()
    assert packed.num_tokens == sum(lengths) == np.count_nonzero(~padding)
    assert packed.fill_fraction == pytest.approx(np.mean(~padding))


@hypothesis.given(documents_of_lengths, st.integers(2, 17))
@hypothesis.settings(deadline=None, max_examples=50)
def test_no_two_rows_fit_into_one(lengths, sequence_length):
    rows = all_rows(pack(make_documents(lengths), sequence_length))
    filled = np.sort(np.count_nonzero(rows.segments_BT, axis=1))
    assert len(filled) < 2 or filled[0] + filled[1] > sequence_length


def test_rows_of_a_small_example():
    packed = pack([np.array([0, 7, 8, 9, 5]), np.array([0, 4]), np.array([0])], 3)
    rows = all_rows(packed)
    np.testing.assert_array_equal(rows.tokens_BT, [[0, 7, 8], [9, 5, 0], [0, 4, 0]])
    np.testing.assert_array_equal(rows.labels_BT, [[7, 8, 9], [5, 0, 0], [4, 0, 0]])
    np.testing.assert_array_equal(rows.segments_BT, [[1, 1, 1], [1, 1, 2], [1, 1, 0]])
    np.testing.assert_array_equal(rows.positions_BT, [[0, 1, 2], [0, 1, 0], [0, 1, 0]])
    assert packed.fill_fraction == 8 / 9


def test_another_tokenizer_has_another_end_of_text():
    packed = pack([np.array([5, 1, 2])], 4, end_of_text=5)
    np.testing.assert_array_equal(packed.row(0).labels_BT, [1, 2, 5, 0])


def test_a_closed_document_is_followed_by_no_label():
    packed = pack([np.array([5, 1, 2, 9]), np.array([5, 3, 9])], 2, end_of_text=5, closed=True)
    rows = [packed.row(index) for index in range(packed.num_rows)]
    seen = [
        (row.tokens_BT[row.segments_BT == part].tolist(), row.labels_BT[row.segments_BT == part].tolist())
        for row in rows
        for part in range(1, row.segments_BT.max() + 1)
    ]
    assert sorted(seen) == [([2], [9]), ([5, 1], [1, 2]), ([5, 3], [3, 9])]
    with pytest.raises(ValueError, match="no documents"):
        pack([np.array([5])], 2, end_of_text=5, closed=True)


@pytest.mark.parametrize(
    ("documents", "sequence_length", "message"),
    [
        ([], 4, "no documents to pack"),
        ([np.array([0, 1]), np.array([1, 2])], 4, "does not begin with the end-of-text token"),
        ([np.array([], np.int32)], 4, "does not begin with the end-of-text token"),
        ([np.array([0, 1])], 0, "sequence_length = 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_packed_is_refused(documents, sequence_length, message):
    with pytest.raises(ValueError, match=message):
        pack(documents, sequence_length)


# batches


@pytest.fixture(scope="module")
def packed():
    draw = np.random.default_rng(0)
    return pack(make_documents(draw.integers(1, 60, 100)), 16)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(batches_a, batches_b):
    for batch_a, batch_b in zip(batches_a, batches_b, strict=True):
        for array_a, array_b in zip(batch_a, batch_b, strict=True):
            np.testing.assert_array_equal(array_a, array_b)


def test_batches_have_their_shape(packed):
    batch = next(iter(batches(packed, 4, seed=0)))
    assert isinstance(batch, Batch)
    assert {(array.shape, array.dtype) for array in batch} == {((4, 16), np.dtype(np.int32))}


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_each_epoch_has_every_row_once_in_its_own_order(packed, batch_size):
    assert packed.num_rows % 3 and packed.num_rows % 7
    taken = take(iter(batches(packed, batch_size, seed=1)), 2 * packed.num_rows // batch_size + 1)
    rows = np.concatenate([np.concatenate(batch, axis=1) for batch in taken])
    epochs = rows[: packed.num_rows], rows[packed.num_rows : 2 * packed.num_rows]
    everything = np.concatenate(all_rows(packed), axis=1)
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, everything))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] != everything).any()


def test_a_batch_depends_on_rows_seed_and_step_alone(packed):
    first = take(iter(batches(packed, 4, seed=5)), 30)
    assert_same(first, take(iter(batches(packed, 4, seed=5)), 30))
    other = take(iter(batches(packed, 4, seed=6)), 30)
    assert any((a.tokens_BT != b.tokens_BT).any() for a, b in zip(first, other))


@hypothesis.given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 2**32 - 1))
@hypothesis.settings(deadline=None, max_examples=25)
def test_resumed_stream_gives_the_same_batches(packed, steps, batch_size, seed):
    stream = iter(batches(packed, batch_size, seed))
    take(stream, steps)
    state = stream.get_state()
    expected = take(stream, 5)
    resumed = iter(batches(packed, batch_size, seed))
    resumed.set_state(state)
    assert_same(take(resumed, 5), expected)
    stream.set_state(state)  # the same stream, set back
    assert_same(take(stream, 5), expected)


# windows


@hypothesis.given(st.integers(0, 70), st.integers(1, 20), st.data())
@hypothesis.settings(deadline=None, max_examples=80)
def test_windows_score_each_token_once_with_enough_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    tokens = np.arange(length, dtype=np.int32)  # each token is its own position
    tokens_NT, labels_NT, scored_NT = windows(tokens, context, stride)
    assert tokens_NT.shape == labels_NT.shape == scored_NT.shape == (len(tokens_NT), context)
    assert (tokens_NT.dtype, labels_NT.dtype, scored_NT.dtype) == (np.int32, np.int32, bool)
    np.testing.assert_array_equal(np.sort(labels_NT[scored_NT]), tokens[1:])
    for row_T, label_T, scored_T in zip(tokens_NT, labels_NT, scored_NT):
        assert scored_T.any()
        for place in np.flatnonzero(scored_T):
            before = row_T[: place + 1]
            np.testing.assert_array_equal(before, np.arange(label_T[place] - len(before), label_T[place]))
            assert len(before) >= min(label_T[place], context - stride + 1)


def test_stride_must_fit_the_context():
    for stride in (0, 9):
        with pytest.raises(ValueError, match="expected 1 to the context of 8 tokens"):
            windows(np.arange(20), 8, stride)
