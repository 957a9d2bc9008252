import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.engine.sampling import Sampling, sample_tokens

LOGITS_V = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15])).astype(np.float32)
NO_CUT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
jitted = jax.jit(sample_tokens)


def sampling(batch, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    fields = ((temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (seed, np.uint32))
    return Sampling(*(np.broadcast_to(np.asarray(value, dtype), batch) for value, dtype in fields))


def sampled(logits_BV, position=7, **settings):
    batch = len(logits_BV)
    token_B, log_probability_B = jitted(logits_BV, sampling(batch, **settings), np.full(batch, position, np.int32))
    return np.asarray(token_B), np.asarray(log_probability_B)


def probabilities(logits_V, temperature, top_k, top_p):
    """The probabilities by definition: temperature, then top-k, then top-p."""
    scaled_V = logits_V.astype(np.float64) / temperature
    share_V = np.exp(scaled_V - scaled_V.max())
    order = np.argsort(-share_V, kind="stable")[: top_k or None]
    share = share_V[order] / share_V[order].sum()
    kept = order[: int(np.searchsorted(np.cumsum(share), top_p - 1e-9)) + 1]
    out_V = np.zeros_like(share_V)
    out_V[kept] = share_V[kept]
    return out_V / out_V.sum()


def test_temperature_zero_takes_the_best_token_and_the_lowest_id_of_a_tie():
    logits_BV = np.array([[0, 3, 1, 3], [2, 0, 5, 1]], np.float32)
    token_B, log_probability_B = sampled(logits_BV, top_k=3, top_p=0.5)
    assert token_B.tolist() == [1, 2]
    expected = logits_BV.max(axis=1) - np.log(np.exp(logits_BV).sum(axis=1))
    np.testing.assert_allclose(log_probability_B, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        NO_CUT,
        {**NO_CUT, "temperature": 0.5},
        {**NO_CUT, "temperature": 3.0},
        {**NO_CUT, "top_k": 2},
        {**NO_CUT, "top_k": 99},
        {**NO_CUT, "top_p": 0.6},  # 0.4 + 0.3
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5},  # of 0.4, 0.3, 0.15 over 0.85
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
        {**NO_CUT, "top_p": 1e-6},
    ],
    ids=str,
)
def test_tokens_are_sampled_as_often_as_expected(settings):
    count = 20000
    token_B, log_probability_B = sampled(np.tile(LOGITS_V, (count, 1)), seed=np.arange(count), **settings)
    expected_V = probabilities(LOGITS_V, **settings)
    counts_V = np.bincount(token_B, minlength=5)
    deviation_V = np.sqrt(count * expected_V * (1 - expected_V))
    assert (counts_V[expected_V == 0] == 0).all()
    assert (np.abs(counts_V - count * expected_V) <= 4.5 * deviation_V).all()
    np.testing.assert_allclose(log_probability_B, LOGITS_V[token_B], rtol=1e-5)  # whatever the settings


def test_a_row_samples_the_same_token_at_any_place_in_the_batch():
    random = np.random.default_rng(0)
    logits_BV = random.standard_normal((8, 50)).astype(np.float32)
    seed_B = np.arange(8)
    temperature_B = np.array([0, 1, 2, 0.5, 1, 0, 1, 3])
    token_B, _ = sampled(logits_BV, temperature=temperature_B, seed=seed_B)
    order = random.permutation(8)
    shuffled_B, _ = sampled(logits_BV[order], temperature=temperature_B[order], seed=seed_B[order])
    np.testing.assert_array_equal(shuffled_B, token_B[order])
    for row in range(8):
        alone_B, _ = sampled(logits_BV[row : row + 1], temperature=temperature_B[row], seed=row)
        assert alone_B[0] == token_B[row]


def test_the_sample_depends_on_seed_and_position():
    logits_BV = np.zeros((1, 4096), np.float32)
    first, again = (sampled(logits_BV, temperature=1.0, seed=3)[0][0] for _ in range(2))
    assert first == again
    assert first != sampled(logits_BV, temperature=1.0, seed=4)[0][0]
    assert first != sampled(logits_BV, temperature=1.0, seed=3, position=8)[0][0]
    assert sampled(logits_BV, temperature=1.0, seed=2**32 - 1)[0][0] < 4096


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature):
    logits_BV = np.array([[80.0, 100.0, 99.0, -np.inf]], np.float32)
    assert sampled(logits_BV, temperature=temperature)[0].tolist() == [1]


@given(
    st.lists(st.integers(-40, 40), min_size=6, max_size=6),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.integers(0, 7),
    st.sampled_from([0.01, 0.3, 0.7, 0.95, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_no_excluded_token_is_sampled(levels, temperature, top_k, top_p, seed):
    """With distinct logits the tokens that remain are known exactly, up to rounding at the edge of top-p."""
    logits_V = np.array(levels, np.float32) / 8 + np.arange(6, dtype=np.float32) / 64
    token_B, _ = sampled(logits_V[None], temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    generous_V = probabilities(logits_V, temperature, top_k, min(1.0, top_p + 1e-5))
    assert generous_V[token_B[0]] > 0
