"""Checkpoints of every family written by transformers, against its logits; see make.py."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import moe_jax
from moe_jax import checkpoint
from moe_jax.engine import cache as caches
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from tests.family_variants import GOLDEN, VARIANTS

FOLDER = pathlib.Path(__file__).parent
TOLERANCE = 1e-5  # float32 on both sides


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request, tmp_path_factory):
    """A model, tokens, and the expected logits."""
    path, folder = FOLDER / f"{request.param}.safetensors", tmp_path_factory.mktemp("golden") / "model"
    tensors = safetensors.numpy.load_file(path)
    tokens_BT, logits_BTV = tensors.pop("golden.tokens"), tensors.pop("golden.logits")
    with safetensors.safe_open(path, "numpy") as file:
        config = file.metadata()["config"]
    folder.mkdir()
    (folder / "config.json").write_text(config)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert checkpoint.open(folder).architecture == VARIANTS[request.param].architecture
    return moe_jax.load(folder, dtype="float32"), tokens_BT, logits_BTV


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_the_files_are_small():
    paths = list(FOLDER.glob("*.safetensors"))
    assert {path.stem for path in paths} == set(GOLDEN)
    assert sum(path.stat().st_size for path in paths) < 2e6


def test_logits(golden):
    model, tokens_BT, logits_BTV = golden
    assert_close(model.logits(tokens_BT), logits_BTV)


def test_cached_decode(golden):
    """A prefill of half the tokens, then one at a time."""
    model, tokens_BT, logits_BTV = golden
    architecture, (batch, length) = model.architecture, tokens_BT.shape
    execution = execution_of(architecture)
    live = policies.settings([MODEL_OWN] * batch, architecture, execution.k_max)

    @jax.jit
    def extend(params, cache, tokens_BT, start_B):
        valid_BT = jnp.ones(tokens_BT.shape, bool)
        x_BTD, cache, _ = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, live, execution)
        return decoder.logits(params, x_BTD), cache

    cache = caches.allocate(architecture, batch, length, jnp.float32)
    half = length // 2
    got_BTV, cache = extend(model.params, cache, tokens_BT[:, :half], np.zeros(batch, np.int32))
    assert_close(np.asarray(got_BTV), logits_BTV[:, :half])
    for at in range(half, length):
        got_BTV, cache = extend(model.params, cache, tokens_BT[:, at : at + 1], np.full(batch, at, np.int32))
        assert_close(np.asarray(got_BTV), logits_BTV[:, at : at + 1])


def test_a_saved_copy_gives_the_same_logits(golden, tmp_path):
    model, tokens_BT, logits_BTV = golden
    model.save(tmp_path / "model", dtype="bfloat16")
    assert_close(moe_jax.load(tmp_path / "model", dtype="float32").logits(tokens_BT), logits_BTV)


def test_the_number_of_experts_is_saved(golden, tmp_path):
    model, _, _ = golden
    model.save(tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    fields["num_experts_per_tok"] -= 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    fewer = checkpoint.open(tmp_path / "model").architecture
    assert fewer.moe.k == model.architecture.moe.k - 1
