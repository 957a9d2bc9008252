"""Windows scored together against decoding them step by step, each group of rows by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.engine import cache as caches
from moe_jax.engine.request import execution_of
from moe_jax.evaluation import concurrent
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import parse
from tests import chained_model, tiny_model

ARCHITECTURE = tiny_model.ARCHITECTURE
PARAMS = tiny_model.random_params(ARCHITECTURE)
EXECUTION = execution_of(ARCHITECTURE)
SIMILARITY_LEE = np.random.default_rng(3).uniform(-1, 1, (2, 16, 16)).astype(np.float32)
CALIBRATION = Calibration(np.full(2, 0.5, np.float32), SIMILARITY_LEE, np.zeros(1))
LENGTH = 8
SPECS = (
    *("opportunistic:2", "budget:9", "reroute:2,0.2", "capacity:1.0", "capacity:1.0,overflow=next"),
    *("topk:5+opportunistic:3", "mass:0.6+opportunistic:1", "ratio:0.5", "model"),
)


def windows(count=8):
    tokens_JT = np.random.default_rng(0).integers(0, ARCHITECTURE.decoder.vocab_size, (count, LENGTH + 1))
    return concurrent.Windows(tokens_JT.astype(np.int32), np.full(count, 20), np.arange(count))


@jax.jit
def extend(params, cache, tokens_BT, start_B, live):
    valid_BT = jnp.ones(tokens_BT.shape, bool)
    x_BTD, cache, use = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, live, EXECUTION)
    return jax.nn.log_softmax(decoder.logits(params, x_BTD)[:, 0]), cache, use.chosen_NK


def decoded(tokens_BT, policy):
    """Bits of each row, and chosen_LBTK, one token of every row at a time."""
    rows = len(tokens_BT)
    live = policies.settings([policy] * rows, ARCHITECTURE, EXECUTION.k_max)
    cache = caches.allocate(ARCHITECTURE, rows, LENGTH, jnp.float32)
    bits_B, chosen = np.zeros(rows), []
    for at in range(LENGTH):
        start_B = np.full(rows, at, np.int32)
        log_BV, cache, chosen_LBK = extend(PARAMS, cache, tokens_BT[:, at : at + 1], start_B, live)
        bits_B -= np.asarray(log_BV)[np.arange(rows), tokens_BT[:, at + 1]] / np.log(2)
        chosen.append(np.asarray(chosen_LBK))
    return bits_B, np.stack(chosen, axis=2)


@pytest.mark.parametrize("concurrency", [1, 2, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_windows_together_equal_decoding_step_by_step(spec, concurrency):
    policy, given = parse(spec, CALIBRATION), windows()
    got = concurrent.score_windows(PARAMS, given, policy, EXECUTION, rows=4, concurrency=concurrency)
    groups = [given.tokens_JT[first : first + concurrency] for first in range(0, 8, concurrency)]
    bits, chosen = zip(*(decoded(group, policy) for group in groups))
    np.testing.assert_allclose(got.bits_J, np.concatenate(bits), rtol=1e-5)
    chosen_LJTK = np.concatenate(chosen, axis=1)[..., : got.chosen_LJTK.shape[3]]
    np.testing.assert_array_equal(got.chosen_LJTK, chosen_LJTK)


def test_the_set_of_experts_is_not_formed_over_the_tokens_of_a_row():
    """At concurrency 1 the set of a step is the row's own; over the tokens of a prefill it would be nearly all."""
    seen = concurrent.score_windows(PARAMS, windows(), parse("opportunistic:2"), EXECUTION, rows=4, concurrency=1)
    assert ((seen.chosen_LJTK >= 0).sum(axis=3) == 2).all()


def test_distinct_experts_are_counted_over_the_rows_of_a_step():
    seen = concurrent.score_windows(PARAMS, windows(), parse("topk:3"), EXECUTION, rows=4, concurrency=4)
    expected = [
        len({int(e) for row in range(first, first + 4) for e in seen.chosen_LJTK[layer, row, at]})
        for layer in range(2)
        for first in (0, 4)
        for at in range(LENGTH)
    ]
    assert concurrent.distinct_at(seen.chosen_LJTK, 4) == pytest.approx(np.mean(expected))
    assert concurrent.distinct_at(seen.chosen_LJTK, 1) == 3


def test_replayed_steps_are_those_of_groups():
    chosen_LJTK = np.arange(2 * 8 * LENGTH * 3).reshape(2, 8, LENGTH, 3)
    steps_SLBK = concurrent.steps_of(chosen_LJTK, 4, 4)
    for number, (group, at) in enumerate([(0, 1), (1, 3), (0, 5), (1, 7)]):
        np.testing.assert_array_equal(steps_SLBK[number], chosen_LJTK[:, group * 4 : group * 4 + 4, at])


def test_windows_are_full_and_count_their_bytes():
    tokenizer = tiny_model.tokenizer()
    texts = [tiny_model.TEXT, "Zoë took a walk; " * 20, "short"]
    documents = [np.array([0, *tokenizer.encode(text).ids], np.int32) for text in texts]
    count = sum((len(ids) - 1) // LENGTH for ids in documents)
    cut = concurrent.cut_windows(documents, tokenizer, LENGTH, count, seed=0)
    assert cut.tokens_JT.shape == (count, LENGTH + 1)
    for document, ids in enumerate(documents):
        own = cut.document_J == document
        full = (len(ids) - 1) // LENGTH * LENGTH
        assert own.sum() == full // LENGTH
        assert cut.bytes_J[own].sum() == len(tokenizer.decode(ids[1 : full + 1].tolist()).encode())
        starts = sorted(map(tuple, cut.tokens_JT[own].tolist()))
        assert starts == sorted(tuple(ids[at : at + LENGTH + 1].tolist()) for at in range(0, full, LENGTH))
    with pytest.raises(ValueError, match=rf"has {count} full windows of 8 tokens: expected at least {count + 1}"):
        concurrent.cut_windows(documents, tokenizer, LENGTH, count + 1, seed=0)


@pytest.mark.parametrize("begins", [True, False])
def test_the_bytes_of_windows_add_up_where_the_decoder_strips_a_leading_space(begins):
    tokenizer = chained_model.sentencepiece_like()
    ids = np.array(tokenizer.encode("be be c ha be" * 4, add_special_tokens=begins).ids)
    ends = range(0, len(ids), 5)
    found = concurrent.cut_windows([ids], tokenizer, 5, len(ends) - 1, seed=0)
    read = [len(tokenizer.decode(ids[: end + 1].tolist())) for end in ends]
    assert sorted(found.bytes_J.tolist()) == sorted(np.diff(read).tolist())
    assert found.bytes_J.sum() == read[-1] - (0 if begins else len("be"))
