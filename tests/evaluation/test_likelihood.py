"""Held-out likelihood against a plain loop over positions, and intervals that mean what they say."""

import functools
import lzma

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.config.schema import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.evaluation import likelihood
from moe_jax.model import decoder
from moe_jax.routing.policies import base
from moe_jax.routing.policies.parse import parse

CONTEXT = 16
ARCHITECTURE = Architecture(
    DecoderConfig(vocab_size=50, d_model=16, num_layers=2, dense_hidden=24, max_context=CONTEXT),
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    MoEConfig(num_experts=8, k=3, expert_hidden=12),
)
EXECUTION = decoder.Execution(ARCHITECTURE, 3, "blocked")


@pytest.fixture(scope="module")
def params():
    return decoder.split(decoder.Decoder(ARCHITECTURE, nnx.Rngs(1)))


@functools.cache
def jitted_hidden():
    return jax.jit(decoder.hidden, static_argnums=5)


def bits_of_window(params, tokens, policy):
    """Bits of every token of one unpadded sequence but the first."""
    live = base.settings([policy], 1, 3, 3)
    inputs = np.asarray(tokens[:-1])[None]
    positions = np.arange(inputs.shape[1])[None]
    x, _ = jitted_hidden()(params, inputs, positions, np.ones_like(inputs), live, EXECUTION)
    logits_TV = np.asarray(decoder.logits(params, x), np.float64)[0]
    probability_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(axis=1, keepdims=True)
    return [-np.log2(probability[label]) for probability, label in zip(probability_TV, tokens[1:])]


@pytest.mark.parametrize("spec", ["model", "topk:1"])
def test_every_token_is_scored_once_with_the_context_it_has(params, spec):
    policy = parse(spec)
    rng = np.random.default_rng(0)
    documents = [np.r_[0, rng.integers(1, 50, size=size)].astype(np.int32) for size in (1, 5, CONTEXT, 29)]
    got = likelihood.score(params, documents, policy, EXECUTION, context=CONTEXT, batch_size=3)
    half = CONTEXT // 2
    for tokens, bits in zip(documents, got.bits):
        # the first window whole, then windows every half context, each scoring what the last one did not
        scored = bits_of_window(params, tokens[: CONTEXT + 1], policy)
        for start in range(half, len(tokens) - 1 - half, half):
            scored += bits_of_window(params, tokens[start : start + CONTEXT + 1], policy)[half:]
        assert len(scored) == len(tokens) - 1
        wanted = sum(scored)
        np.testing.assert_allclose(bits, wanted, rtol=1e-5)
    k = 3 if spec == "model" else 1
    window_tokens = 1 + 5 + CONTEXT + (CONTEXT + CONTEXT + 13)  # the last document has three windows
    assert got.load_LE.sum() == k * window_tokens


def test_intervals_cover():
    """Documents drawn from a known distribution: 95% intervals hold its mean about 95 times in 100."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        sizes = rng.integers(1000, 5000, size=80)
        bits = sizes * rng.normal(1.5, 0.3, size=80)
        low, high = likelihood.bits_per_byte(bits, sizes, seed=trial).ci95
        held += low <= 1.5 <= high
    assert 88 <= held <= 99


def test_paired_differences_cancel_what_documents_share():
    rng = np.random.default_rng(0)
    reference = rng.uniform(1e3, 1e5, size=50)
    worse = likelihood.paired_ratio(reference * 1.02, reference)
    np.testing.assert_allclose([worse.value, *worse.ci95], 0.02, rtol=1e-9)
    assert likelihood.paired_ratio(reference, reference).value == 0


def test_xz():
    texts = [b"def f(x):\n    return x + 1\n" * 50, bytes(np.random.default_rng(0).integers(256, size=3000).tolist())]
    text = b"".join(texts)
    wanted = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    np.testing.assert_allclose(likelihood.xz_bits_per_byte(texts), wanted, rtol=0.01)
    assert likelihood.xz_bits_per_byte(texts, primer=texts) < 0.05 * wanted
