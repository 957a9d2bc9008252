import collections

import jax.numpy as jnp
import psutil
import pytest

from moe_jax.engine import cache
from tests import tiny_model


@pytest.mark.parametrize(
    ("length", "max_context", "expected"),
    [(1, 512, 16), (16, 512, 16), (17, 512, 32), (256, 512, 256), (257, 512, 512), (290, 300, 300), (3, 8, 8)],
)
def test_lengths_round_up_to_a_power_of_two_within_the_context(length, max_context, expected):
    assert cache.length_bucket(length, max_context) == expected


def test_a_shape_holds_every_request():
    assert cache.shape_of([3, 20, 9], [20, 10, 40], 512) == (4, 32, 64)
    assert cache.shape_of([3], [1], 512) == (1, 16, 16)
    assert cache.shape_of([500] * 9, [12] * 9, 512) == (16, 512, 512)


def test_long_prompts_are_whole_chunks_that_fit_in_the_cache():
    chunk = cache.CHUNK
    assert cache.shape_of([chunk], [9], 16 * chunk) == (1, chunk, 2 * chunk)
    assert cache.shape_of([chunk + 1, 7], [9] * 2, 16 * chunk) == (2, 2 * chunk, 2 * chunk)
    assert cache.shape_of([3 * chunk], [2 * chunk], 16 * chunk) == (1, 4 * chunk, 8 * chunk)
    context = 2 * chunk + 100
    assert cache.shape_of([2 * chunk + 9], [9], context) == (1, 3 * chunk, 3 * chunk)
    assert cache.shape_of([9], [2 * chunk + 9], context) == (1, 16, context)


def test_a_cache_beyond_the_memory_is_refused(monkeypatch):
    memory = collections.namedtuple("memory", "available")
    needed_bytes = 2 * 3 * 4 * 64 * 2 * 16 * 4  # keys and values, L, B, M, G, A, float32
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(needed_bytes))
    cache.require_memory(tiny_model.ARCHITECTURE, [(4, 64)], jnp.float32)
    assert sum(part.nbytes for part in cache.allocate(tiny_model.ARCHITECTURE, 4, 64, jnp.float32)) == needed_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(needed_bytes - 1))
    with pytest.raises(
        ValueError, match=r"4 prompts with up to 64 tokens needs 0.0 GB of memory, 0.0 GB available: expected fewer"
    ):
        cache.require_memory(tiny_model.ARCHITECTURE, [(4, 64)], jnp.float32)
    with pytest.raises(ValueError, match="the cache of 2 prompts with up to 64 tokens needs"):  # and a prefix too
        cache.require_memory(tiny_model.ARCHITECTURE, [(2, 64), (4, 64)], jnp.float32)
