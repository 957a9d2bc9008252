"""Rollouts: continuations of the text's beginnings, from the model's distribution, the same after a kill."""

import numpy as np
import pytest

from moe_jax.engine.request import execution_of
from moe_jax.text.batches import pack
from moe_jax.training import rollouts
from tests.tiny_model import ARCHITECTURE, random_params, tokenizer

LENGTH = 32


@pytest.fixture(scope="module")
def text():
    random = np.random.default_rng(0)
    documents = [np.concatenate([[0], random.integers(1, 320, 90)]).astype(np.int32) for _ in range(5)]
    return pack(documents, LENGTH)


def written(text, folder, seed=0, count=6):
    settings = {"count": count, "seed": seed, "folder": folder}
    return rollouts.write(random_params(), tokenizer(), [0], execution_of(ARCHITECTURE), text, **settings)


def test_each_continues_the_beginning_of_a_row(text, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "_AT_ONCE", 4)
    made = written(text, tmp_path / "parts")
    assert (made.lengths <= LENGTH).all() and len(made.lengths) == 6
    pieces = [made.tokens[start : start + length + 1] for start, length in zip(made.starts, made.lengths)]
    assert all(piece[0] == 0 for piece in pieces)  # as each training text begins
    beginnings = [text.row(row).tokens_BT[: rollouts.PROMPT] for row in range(text.num_rows)]
    expected = {tuple(one) if one[0] == 0 else (0, *one[:-1]) for one in map(np.ndarray.tolist, beginnings)}
    assert {tuple(piece[: rollouts.PROMPT].tolist()) for piece in pieces} <= expected
    for piece in pieces:  # the last label is a sampled token if the text was cut off, else the end-of-text token
        assert len(piece) == LENGTH or piece[-1] == 0
    assert len(list((tmp_path / "parts").rglob("*.npz"))) == 2
    again = written(text, tmp_path / "parts")
    np.testing.assert_array_equal(made.tokens, again.tokens)
    np.testing.assert_array_equal(made.tokens, written(text, tmp_path / "others").tokens)
    assert not np.array_equal(made.tokens[:100], written(text, tmp_path / "seed", seed=1).tokens[:100])
