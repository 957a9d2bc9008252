"""Held-out likelihood against a plain loop over positions."""

import functools
import lzma

import jax
import numpy as np
import pytest

from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.evaluation import likelihood, scoring
from moe_jax.evaluation.journal import Journal
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from tests import tiny_model

CONTEXT = 16
ARCHITECTURE = Architecture(
    DecoderConfig(vocab_size=50, d_model=16, num_layers=2, dense_hidden=24, max_context=CONTEXT),
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    MoEConfig(num_experts=8, k=3, expert_hidden=12),
)
EXECUTION = decoder.Execution(ARCHITECTURE, 3, tiny_model.KERNELS)


@pytest.fixture(scope="module")
def params():
    return tiny_model.random_params(ARCHITECTURE, seed=1)


@functools.cache
def jitted_hidden():
    return jax.jit(decoder.hidden, static_argnums=5)


def probabilities(params, tokens, policy):
    """Probabilities of the next token after every token but the last, for one unpadded sequence."""
    live = policies.settings([policy], ARCHITECTURE, 3)
    inputs = np.asarray(tokens[:-1])[None]
    positions = np.arange(inputs.shape[1])[None]
    x, _ = jitted_hidden()(params, inputs, positions, np.ones_like(inputs), live, EXECUTION)
    logits_TV = np.asarray(decoder.logits(params, x), np.float64)[0]
    return np.exp(logits_TV) / np.exp(logits_TV).sum(axis=1, keepdims=True)


def bits_of_window(params, tokens, policy):
    """Bits of every token but the first, for one unpadded sequence."""
    probability_TV = probabilities(params, tokens, policy)
    return [-np.log2(probability[label]) for probability, label in zip(probability_TV, tokens[1:])]


def documents():
    rng = np.random.default_rng(0)
    return [np.r_[0, rng.integers(1, 50, size=size)].astype(np.int32) for size in (1, 5, CONTEXT, 37)]


def score(params, *specs, **options):
    settings = {"context": CONTEXT, "batch_size": 3, **options}
    return likelihood.score_documents(params, documents(), [parse(spec) for spec in specs], EXECUTION, **settings)


def windows(tokens):
    """The first window, then windows that overlap by a quarter, which is not scored: (window, unscored)."""
    quarter = CONTEXT // 4
    starts = range(CONTEXT - quarter, len(tokens) - 1 - quarter, CONTEXT - quarter)
    return [(tokens[: CONTEXT + 1], 0)] + [(tokens[start : start + CONTEXT + 1], quarter) for start in starts]


def test_every_token_is_scored_once_with_the_context_it_has(params):
    for spec, k, got in zip(("model", "topk:1"), (3, 1), score(params, "model", "topk:1")):
        for tokens, bits, count in zip(documents(), got.bits_J, got.tokens_J):
            scored = [
                one for window, skip in windows(tokens) for one in bits_of_window(params, window, parse(spec))[skip:]
            ]
            assert len(scored) == len(tokens) - 1 == count
            np.testing.assert_allclose(bits, sum(scored), rtol=1e-5)
        window_tokens = 1 + 5 + CONTEXT + (CONTEXT + CONTEXT + 13)  # the last document has three windows
        assert got.load_LE.sum() == k * window_tokens


def test_divergence_is_that_of_the_reference_from_each_policy(params):
    few, full = score(params, "topk:1", "model", reference=1)
    for number, tokens in enumerate(documents()):
        expected = 0.0
        for window, skip in windows(tokens):
            p_TV, q_TV = (probabilities(params, window, parse(spec)) for spec in ("model", "topk:1"))
            expected += (p_TV * np.log(p_TV / q_TV)).sum(axis=1)[skip:].sum()
        np.testing.assert_allclose(few.kl_J[number], expected, rtol=1e-4)
    assert few.kl_J.min() > 0
    np.testing.assert_array_equal(full.kl_J, 0)


def test_chunks_of_labels_change_nothing(params, monkeypatch):
    [whole] = score(params, "model", reference=0)
    monkeypatch.setattr(scoring, "CHUNK", 7)
    jax.clear_caches()
    [chunked] = score(params, "model", reference=0)
    jax.clear_caches()
    np.testing.assert_allclose(chunked.bits_J, whole.bits_J, rtol=1e-6)


def test_a_finished_batch_is_not_computed_again(params, tmp_path):
    whole = score(params, "model", "topk:1", reference=0)
    with_journal = score(params, "model", "topk:1", reference=0, journal=Journal(tmp_path, {}))
    dead = jax.tree.map(np.zeros_like, params)  # parts in the journal need no weights
    next(tmp_path.rglob("windows-000003.npz")).unlink()
    again = score(params, "model", "topk:1", reference=0, journal=Journal(tmp_path, {}))
    read = score(dead, "model", "topk:1", reference=0, journal=Journal(tmp_path, {}))
    for other in (with_journal, again, read):
        for one, expected in zip(other, whole):
            jax.tree.map(np.testing.assert_array_equal, one, expected)


def test_xz():
    texts = [b"def f(x):\n    return x + 1\n" * 50, bytes(np.random.default_rng(0).integers(256, size=3000).tolist())]
    text = b"".join(texts)
    expected = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    np.testing.assert_allclose(likelihood.xz_bits_per_byte(texts), expected, rtol=0.01)
    assert likelihood.xz_bits_per_byte(texts, primer=texts) < 0.05 * expected


def test_long_windows_are_read_fewer_at_a_time(params, monkeypatch):
    """The results are the same."""
    documents = [np.arange(40, dtype=np.int32) % 50 for _ in range(3)]
    settings = {"context": 16, "batch_size": 4}
    compared = [parse("topk:2")]
    [together] = likelihood.score_documents(params, documents, compared, EXECUTION, **settings)
    rows = []
    score = likelihood.score

    def counted(params, batch, *args, **named):
        rows.append(len(batch.tokens_BT))
        return score(params, batch, *args, **named)

    monkeypatch.setattr(likelihood, "score", counted)
    monkeypatch.setattr(likelihood, "TOKENS", 32)
    [one_by_one] = likelihood.score_documents(params, documents, compared, EXECUTION, **settings)
    assert set(rows) == {2}
    np.testing.assert_allclose(one_by_one.bits_J, together.bits_J, rtol=1e-6)
