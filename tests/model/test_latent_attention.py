"""Latent attention: cached decoding equals whole sequences, and the cache holds only latents and rotary keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.engine import cache as caches
from moe_jax.kernels.chooser import Kernels
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from tests import tiny_model
from tests.family_variants import VARIANTS, random_params

TOLERANCE = 1e-5  # of the largest value, float32


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


# the last pads latents in the cache
KERNELS = [tiny_model.KERNELS, *(Kernels("blocked", "xla", name, "blocked") for name in ("xla", "matmul"))]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.cached_attention)
def test_cached_decode_of_a_ragged_batch_equals_the_whole_sequence(kernels):
    """A variant that is not among those in `golden`, whose decode steps are compared with transformers."""
    variant = VARIANTS["deepseek_v3_halves"]
    architecture, params = variant.architecture, random_params(variant)
    execution = decoder.Execution(architecture, architecture.moe.k, kernels)
    tokens_BT = np.random.default_rng(0).integers(0, 64, (4, 16), dtype=np.int32)
    live = policies.settings([MODEL_OWN] * 4, architecture, architecture.moe.k)

    @jax.jit
    def whole(params, tokens_BT):
        positions_BT = jnp.tile(jnp.arange(16, dtype=jnp.int32), (4, 1))
        x_BTD, _ = decoder.hidden(params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), live, execution)
        return decoder.logits(params, x_BTD)

    @jax.jit
    def extend(params, cache, tokens_BT, start_B, valid_BT):
        x_BTD, cache, _ = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, live, execution)
        return decoder.logits(params, x_BTD), cache

    expected_BTV, length_B, rows = whole(params, tokens_BT), np.array([8, 2, 5, 7], np.int32), np.arange(4)
    valid_BT = np.arange(8)[None, :] < length_B[:, None]
    cache = caches.allocate(architecture, 4, 16, jnp.float32, multiple=execution.channel_multiple)
    prompts_BT = np.where(valid_BT, tokens_BT[:, :8], 63)
    logits_BTV, cache = extend(params, cache, prompts_BT, np.zeros(4, np.int32), valid_BT)
    for row, length in enumerate(length_B):
        assert_close(logits_BTV[row, :length], expected_BTV[row, :length])
    for at_B in (length_B + step for step in range(8)):
        logits_BTV, cache = extend(params, cache, tokens_BT[rows, at_B][:, None], at_B, np.ones((4, 1), bool))
        assert_close(logits_BTV[:, 0], expected_BTV[rows, at_B])


def test_the_cache_holds_one_latent_and_one_rotary_key_per_position():
    architecture = VARIANTS["deepseek_v3"].architecture
    cache = caches.allocate(architecture, 2, 16, jnp.bfloat16)
    assert cache.key_LBMGA.shape == (architecture.decoder.num_layers, 2, 16, 1, 24 + 8)
    assert cache.value_LBMGX is None
    padded = caches.allocate(architecture, 2, 16, jnp.bfloat16, multiple=128)
    assert padded.key_LBMGA.shape == (*cache.key_LBMGA.shape[:4], 128)
