"""Picks what to ask about documents: at random, and as evenly over the documents as they permit."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


def pick_evenly(
    places: Sequence[Sequence[Any]],
    make: Callable[[int, Any], Item | None],
    count: int,
    rng: np.random.Generator,
) -> list[Item]:
    """Visits the documents in turn, and makes one item at a random place of each, until there are enough.

    Args:
        places: for each document, where an item may be made: integers, or tuples of integers.
        make: makes an item from a document's index and a place in it, or returns None if that does not work; then the
            document's next place is tried. No place is tried twice.
        count: the number of items.
        rng: shuffles the places of each document; `make` may draw from it too.

    Returns:
        `count` items in the order in which they were made; fewer if the documents do not have as many.
    """
    untried = [rng.permutation(np.array(in_document, np.int64)).tolist() for in_document in places]
    items: list[Item] = []
    while any(untried):
        for document, waiting in enumerate(untried):
            if len(items) == count:
                return items
            item = None
            while waiting and item is None:
                item = make(document, waiting.pop())
            if item is not None:
                items.append(item)
    return items
