"""Conversion between layouts of checkpoints: bit-identical if nothing is cast, refused if impossible."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint, conversion
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config import gin
from moe_jax.engine.request import execution_of
from moe_jax.training.step import start
from tests import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", dtype="bfloat16")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_orbax_and_back_is_bit_identical(folder, tmp_path):
    conversion.convert(folder, tmp_path / "orbax", layout="orbax")
    assert not list((tmp_path / "orbax").glob("*.safetensors"))
    conversion.convert(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_dtype_and_k_through_both_layouts(folder, tmp_path, layout):
    conversion.convert(folder, tmp_path / "new", layout=layout, dtype="float32", policy="topk:3")
    conversion.convert(tmp_path / "new", tmp_path / "back", shard_bytes=10_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    opened = checkpoint.open(tmp_path / "back")
    architecture, params = opened.architecture, opened.read()
    assert architecture == tiny_model.changed(moe={"k": 3})
    expected = checkpoint.open(folder).read("float32")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {array.dtype.name for array in jax.tree.leaves(params)} == {"float32"}


def test_logits_equal_those_of_the_policy(folder, tmp_path):
    conversion.convert(folder, tmp_path / "three", policy="topk:3", dtype="float32")
    tokens_BT = np.random.default_rng(0).integers(0, 512, (2, 9), dtype=np.int32)
    given = moe_jax.load(folder, dtype="float32")
    three = moe_jax.load(tmp_path / "three").logits(tokens_BT)
    np.testing.assert_array_equal(three, given.logits(tokens_BT, policy="topk:3", k_max=3))
    assert np.abs(three - given.logits(tokens_BT)).max() > 0.01


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a training run: its configuration, tokenizer and checkpoints."""
    folder = tmp_path / "run"
    sections = {"decoder": tiny_model.ARCHITECTURE.decoder, "attention": tiny_model.ARCHITECTURE.attention}
    config = moe_jax.read_config(None, ["training.sequence_length=32"])
    config = dataclasses.replace(config, moe=tiny_model.ARCHITECTURE.moe, **sections)
    tiny_model.write_model(folder / "tokenizer")
    (folder / "run.gin").write_text(gin.to_gin(config))
    state = start(execution_of(config.architecture), config.training, 7)
    checkpoints = Checkpoints(folder / "checkpoints", kept=2)
    checkpoints.save(3, state._replace(params=jax.tree.map(lambda x: 2 * x, state.params)), {})
    checkpoints.save(5, state, {})
    checkpoints.close()
    return folder, state.all_params()


def test_the_last_checkpoint_of_a_run(run_folder, tmp_path):
    folder, expected = run_folder
    conversion.convert(folder, tmp_path / "out", policy="topk:2")
    model = moe_jax.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    assert model.architecture == tiny_model.changed(moe={"k": 2})
    assert model.tokenizer.encode("The fox").ids == tiny_model.tokenizer().encode("The fox").ids
    conversion.convert(folder, tmp_path / "orbax", layout="orbax", dtype="bfloat16")
    conversion.convert(tmp_path / "orbax", tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="checkpoints is missing"):
        conversion.convert(folder, tmp_path / "none")
    (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        conversion.convert(folder, tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "mass:0.5"}, r"policy\.spec = 'mass:0\.5': a checkpoint has one k for all tokens"),
        ({"policy": "topk:17"}, r"moe\.k = 17: expected at most moe\.num_experts = 16"),
        ({"policy": "tpok:2"}, "did you mean"),
        ({"layout": "gguf"}, "layout = 'gguf'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
    ],
)
def test_impossible_conversions_are_refused_and_write_nothing(folder, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        conversion.convert(folder, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_another_k_in_each_layer_goes_through_both_layouts(folder, tmp_path, layout):
    conversion.convert(folder, tmp_path / "out", layout=layout, policy="layers:8,4")
    conversion.convert(tmp_path / "out", tmp_path / "back")
    assert moe_jax.load(tmp_path / "back").architecture == tiny_model.changed(moe={"k_of_layers": (8, 4)})


def test_nothing_is_overwritten_and_damage_is_reported(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing is overwritten"):
        conversion.convert(folder, folder)
    conversion.convert(folder, tmp_path / "orbax", layout="orbax")
    (tmp_path / "orbax" / "params.json").write_text('{"norm_D": "float3"}')
    with pytest.raises(ValueError, match=r"params\.json is missing or damaged"):
        conversion.convert(tmp_path / "orbax", tmp_path / "out")
    assert not (tmp_path / "out").exists()
