"""Continuations against plain log-softmax of the model's logits; truncation, shared rows, refusals."""

import numpy as np
import pytest

import moe_jax
from moe_jax.engine.request import execution_of
from moe_jax.evaluation import continuations, scoring
from moe_jax.evaluation.continuations import Pair, num_truncated, require_row_wise, score_continuations
from moe_jax.routing.policies.parse import parse
from tests import tiny_model

CONTEXT = tiny_model.ARCHITECTURE.decoder.max_context


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return moe_jax.load(tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny"))


def one_by_one(model, pair, policy):
    """The result for one pair, from all logits of its row."""
    ids = [*pair.context_ids, *pair.continuation_ids][-(CONTEXT + 1) :]
    logits_TV = model.logits(np.array([ids[:-1]]), policy=policy)[0].astype(np.float64)
    log_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    count = len(pair.continuation_ids)
    rows, labels = np.arange(len(ids) - 1 - count, len(ids) - 1), ids[-count:]
    return log_TV[rows, labels].sum(), bool((log_TV[rows].argmax(axis=1) == labels).all())


def random_pairs(model):
    """Pairs of all lengths: some too long, some equal but for the last token, some generated greedily."""
    random = np.random.default_rng(0)
    lengths = [(1, 1), (1, CONTEXT), (5, 3), (CONTEXT, 1), (CONTEXT, 5), (90, 2), (15, 1), (16, 1), (7, 20), (3, 2)]
    pairs = [Pair(*(random.integers(0, 320, count).tolist() for count in both)) for both in lengths]
    pairs += [Pair(pairs[2].context_ids, [*pairs[2].continuation_ids[:-1], token]) for token in range(4)]
    written = model.generate([pairs[2].context_ids], max_new_tokens=4)[0].ids
    return [*pairs, Pair(pairs[2].context_ids, written), Pair(pairs[2].context_ids, [*written[:3], 300])]


@pytest.mark.parametrize("spec", ["model", "topk:2", "layers:8,1"])
def test_scores_of_all_lengths(model, spec):
    pairs, execution = random_pairs(model), execution_of(model.architecture)
    known = {}
    found = score_continuations(model.params, pairs, parse(spec), execution, batch_size=4, on_scored=known.__setitem__)
    assert known == dict(enumerate(found))
    for pair, scored in zip(pairs, found):
        expected, is_greedy = one_by_one(model, pair, spec)
        assert scored.log_probability == pytest.approx(expected, rel=1e-5)
        assert scored.is_greedy == is_greedy
    if spec == "model":
        assert found[-2].is_greedy and not found[-1].is_greedy
    assert num_truncated(pairs, CONTEXT) == 2


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of the batches that are scored: rows and labels."""
    seen = []

    def score(params, batch, *rest, **options):
        seen.append((batch.tokens_BT.shape, batch.label_Y.shape))
        return scoring.score(params, batch, *rest, **options)

    monkeypatch.setattr(continuations, "score", score)
    return seen


def test_pairs_that_read_the_same_share_a_row(model, shapes):
    pairs = [Pair([1, 2, 3], [token]) for token in range(40)]
    found = score_continuations(model.params, pairs, parse("model"), execution_of(model.architecture), batch_size=8)
    assert shapes == [((1, 16), (64,))]
    assert len({one.log_probability for one in found}) == 40
    assert sum(np.exp(one.log_probability) for one in found) < 1


def test_few_shapes_are_compiled(model, shapes):
    random = np.random.default_rng(0)
    pairs = [Pair(random.integers(0, 320, length).tolist(), [1, 2]) for length in range(1, CONTEXT)]
    score_continuations(model.params, pairs, parse("model"), execution_of(model.architecture), batch_size=4)
    assert set(shapes) == {((4, 32), (128,)), ((4, 16), (64,))}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (Pair([], [1]), "request 1 has no tokens in its context"),
        (Pair([1], []), "request 1 has no tokens in its continuation"),
        (Pair([1], [2] * (CONTEXT + 1)), f"a continuation of {CONTEXT + 1} tokens: expected at most"),
    ],
)
def test_pairs_that_cannot_be_scored(model, pair, words):
    with pytest.raises(ValueError, match=words):
        score_continuations(model.params, [pair], parse("model"), execution_of(model.architecture), batch_size=4)


def test_no_pairs(model):
    assert score_continuations(model.params, [], parse("model"), execution_of(model.architecture), batch_size=4) == []


def test_policies_that_look_at_their_neighbours_are_refused(model):
    class Pooled:
        spec, batch_aware = "pool:4", True

    require_row_wise(parse("topk:4"))
    with pytest.raises(ValueError, match="'pool:4' looks at the rows of one decode step: expected a row-wise policy"):
        score_continuations(model.params, [Pair([1], [2])], Pooled(), execution_of(model.architecture), batch_size=4)
