"""Writing a folder in Hugging Face layout: its contents, and what is refused."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface, safetensors_file
from tests.checkpoint.tiny_folder import (
    PLAIN,
    TINY,
    flattened,
    random_params,
)


def test_auto_keeps_dtypes_and_others_convert(tmp_path):
    params = random_params(TINY, np.dtype(ml_dtypes.bfloat16))
    huggingface.write_checkpoint(tmp_path / "model", TINY, huggingface.nested(params), dtype="auto")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    read = flattened(checkpoint.open(tmp_path / "model").read(dtype="float32"))
    assert {array.dtype.name for array in read.values()} == {"float32"}
    np.testing.assert_array_equal(read["moe/experts/down_LEDF"], params["moe/experts/down_LEDF"].astype(np.float32))
    read = flattened(checkpoint.open(tmp_path / "model").read(dtype="float16"))
    assert {name for name, array in read.items() if array.dtype != np.float16} == {"moe/router/bias_LE"}


@pytest.mark.parametrize(
    ("setting", "value"), [("score", "softmax"), ("selection_bias", False)], ids=["score", "selection_bias"]
)
def test_an_architecture_that_the_family_cannot_express_is_refused(tmp_path, setting, value):
    architecture = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, **{setting: value}))
    params = huggingface.nested(random_params(TINY, np.float32))
    with pytest.raises(ValueError, match=rf"moe\.{setting}.*glm4_moe"):
        huggingface.write_checkpoint(tmp_path / "model", architecture, params)
    assert not (tmp_path / "model").exists()


def test_token_ids_and_extra_files(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    params = huggingface.nested(random_params(TINY, np.float32))
    path = tmp_path / "model"
    huggingface.write_checkpoint(path, TINY, params, token_ids=ids, extra_files={"tokenizer.model": "{}", "a": b"\xff"})
    assert checkpoint.open(path).token_ids == ids
    assert (path / "tokenizer.model").read_text() == "{}" and (path / "a").read_bytes() == b"\xff"
    (path / "generation_config.json").write_text('{"eos_token_id": 5, "bos_token_id": null}')
    assert checkpoint.open(path).token_ids == ids | {"eos_token_id": 5}
    (path / "generation_config.json").unlink()
    assert checkpoint.open(path).token_ids == ids
    for options in ({"extra_files": {"config.json": "{}"}}, {"token_ids": {"unk_token_id": 1}}):
        with pytest.raises(ValueError, match=r"config\.json|unk_token_id"):
            huggingface.write_checkpoint(tmp_path / "other", TINY, params, **options)


def test_nothing_is_overwritten_unless_asked(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    params = huggingface.nested(random_params(TINY, np.float32))
    with pytest.raises(ValueError, match="nothing is overwritten"):
        huggingface.write_checkpoint(folder, TINY, params)
    with pytest.raises(ValueError, match="nothing is overwritten"):
        huggingface.write_checkpoint(folder / "config.json", TINY, params, replace=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    huggingface.write_checkpoint(folder, TINY, params, replace=True)
    assert checkpoint.open(folder).read()["norm_D"].dtype == ml_dtypes.bfloat16


def test_a_write_that_fails_leaves_nothing(tmp_path, folder, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    params = random_params(TINY, np.float32)
    broken = params | {"moe/experts/down_LEDF": np.full_like(params["moe/experts/down_LEDF"], np.nan)}
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight holds NaN"):
        huggingface.write_checkpoint(tmp_path / "new", TINY, huggingface.nested(broken))
    monkeypatch.setattr(safetensors_file.json, "dumps", None)
    with pytest.raises(TypeError):
        huggingface.write_checkpoint(folder, TINY, huggingface.nested(params), replace=True)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    checkpoint.open(folder).read()


def test_params_that_do_not_fit_the_architecture_are_refused(tmp_path):
    params = random_params(TINY, np.float32)
    for change, words in (
        ({"norm_D": np.zeros(15, np.float32)}, r"norm_D has shape \(15,\).*\(16,\)"),
        ({"moe/sinks_LH": np.zeros((2, 6), np.float32)}, "1 unknown: moe/sinks_LH"),
        ({"norm_D": np.zeros(16, np.int32)}, "norm_D is int32"),
    ):
        with pytest.raises(ValueError, match=words):
            huggingface.write_checkpoint(tmp_path / "model", TINY, huggingface.nested(params | change), dtype="auto")
    del params["dense/ffn/down_LDF"]
    with pytest.raises(ValueError, match="1 missing: dense/ffn/down_LDF"):
        huggingface.write_checkpoint(tmp_path / "model", TINY, huggingface.nested(params))
    assert not pathlib.Path(tmp_path / "model").exists()


def test_jax_arrays_are_written_like_numpy_arrays(tmp_path):
    params = random_params(PLAIN, np.dtype(ml_dtypes.bfloat16))
    arrays = {name: jnp.asarray(array) for name, array in params.items()}
    huggingface.write_checkpoint(tmp_path / "jax", PLAIN, huggingface.nested(arrays))
    huggingface.write_checkpoint(tmp_path / "numpy", PLAIN, huggingface.nested(params))
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("jax", "numpy")]
    assert read[0] == read[1]


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10_000])
def test_large_models_are_written_in_shards(tmp_path, folder, shard_bytes):
    params = huggingface.nested(random_params(TINY, np.float32))
    huggingface.write_checkpoint(tmp_path / "parts", TINY, params, dtype="float32", shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    paths = sorted((tmp_path / "parts").glob("model-*-of-*.safetensors"))
    assert [path.name for path in paths] == [
        f"model-{n + 1:05d}-of-{len(paths):05d}.safetensors" for n in range(len(paths))
    ]
    whole = safetensors.numpy.load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    parts = {}
    for path in paths:
        part = safetensors.numpy.load_file(path)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= shard_bytes
        assert {index["weight_map"][name] for name in part} == {path.name}
        parts |= part
    sizes_bytes = dict.fromkeys(index["weight_map"].values(), 0)
    before = paths[0].name
    for name, file in index["weight_map"].items():  # in the order of writing
        assert file == before or sizes_bytes[before] + whole[name].nbytes > shard_bytes, "a file is left half empty"
        sizes_bytes[file] += whole[name].nbytes
        before = file
    assert not (tmp_path / "parts" / "model.safetensors").exists() and parts.keys() == whole.keys()
    assert all((parts[name] == whole[name]).all() for name in whole)
    read = flattened(checkpoint.open(tmp_path / "parts").read())
    assert all((read[name] == array).all() for name, array in flattened(params).items())
