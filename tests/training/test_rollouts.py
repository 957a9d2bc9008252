"""What the full model writes: from beginnings of the text, of its own distribution, the same again after a kill."""

import itertools

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


def test_each_goes_on_from_the_beginning_of_a_row(text, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "_AT_ONCE", 4)
    made = written(text, tmp_path / "parts")
    ends = np.flatnonzero(made.tokens == 0)
    texts = [made.tokens[begin:end] for begin, end in itertools.pairwise(ends)]
    assert len(texts) >= 6 and max(map(len, texts)) <= LENGTH + 1
    beginnings = {tuple(text.row(row).tokens_BT[: rollouts.PROMPT]) for row in range(text.num_rows)}
    openings = {tuple(one[: rollouts.PROMPT]) for one in texts} | {tuple(one[1 : rollouts.PROMPT + 1]) for one in texts}
    assert len(openings & beginnings) >= 4
    assert len(list((tmp_path / "parts").rglob("*.npz"))) == 2
    again = written(text, tmp_path / "parts")
    np.testing.assert_array_equal(made.tokens, again.tokens)
    np.testing.assert_array_equal(made.tokens, written(text, tmp_path / "others").tokens)
    assert not np.array_equal(made.tokens[:100], written(text, tmp_path / "seed", seed=1).tokens[:100])
