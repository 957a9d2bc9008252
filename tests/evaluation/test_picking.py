"""Items are taken from documents in turn, each place at most once."""

import numpy as np
import pytest

from moe_jax.evaluation.picking import pick_evenly

PLACES = [[1, 2, 3, 4], [], [5, 6], [7]]


def pick(count, refused=()):
    tried = []

    def make(document, place):
        tried.append(place)
        assert place in PLACES[document]
        return None if place in refused else (document, place)

    return pick_evenly(PLACES, make, count, np.random.default_rng(0)), tried


@pytest.mark.parametrize(
    ("count", "documents"), [(0, []), (2, [0, 2]), (5, [0, 2, 3, 0, 2]), (9, [0, 2, 3, 0, 2, 0, 0])]
)
def test_documents_take_turns_until_there_are_enough(count, documents):
    items, tried = pick(count)
    assert [document for document, _ in items] == documents
    assert tried == [place for _, place in items]  # nothing is made in vain
    assert len(set(tried)) == len(tried)


def test_another_place_of_the_same_document_is_tried_where_one_does_not_work():
    items, tried = pick(9, refused=(1, 5, 7))
    assert sorted(items) == [(0, 2), (0, 3), (0, 4), (2, 6)] and [document for document, _ in items[:2]] == [0, 2]
    assert sorted(tried) == [1, 2, 3, 4, 5, 6, 7]
