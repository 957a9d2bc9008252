"""Folders that are refused: one line names what is missing, damaged or of another kind."""

import json

import ml_dtypes
import numpy as np
import psutil
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.checkpoint import filling
from tests.checkpoint.tiny_folder import (
    edit_config,
    edit_tensors,
    refusal,
    shard,
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "llama", "glm4_moe"]),
        ({"model_type": None}, ["model_type", "glm4_moe"]),
        ({"model_type": ["glm4_moe"]}, ["model_type", "glm4_moe"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"sliding_window": 4096}, ["sliding_window", "4096", "null"]),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, ["layer_types"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["rope_scaling.rope_type", "llama3", "yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling.original_max_position_embeddings"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope_parameters.rope_type", "linear"]),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, ["rope_parameters.mrope_section"]),
        ({"scoring_func": "softmax"}, ["scoring_func", "softmax", "sigmoid"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "16"}, ["hidden_size", '"16"', "int"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob", "bool"]),
        ({"num_key_value_heads": 4}, ["attention.num_kv_heads", "divisor"]),
        ({"first_k_dense_replace": 4}, ["decoder.num_dense_layers"]),
    ],
)
def test_unsupported_settings_of_config_json_are_refused_by_name(folder, fields, words):
    edit_config(folder, **fields)
    message = refusal(folder)
    for word in ["config.json", *words]:
        assert word in message
    with pytest.raises(ValueError):
        checkpoint.open(folder)


def test_missing_folder_and_files(tmp_path, folder):
    for path in (tmp_path / "nowhere", "some/folder/of/models"):
        message = refusal(path)
        assert f"model.path = '{path}' does not exist" in message and "config.json beside model.safetensors" in message
    assert "is a file" in refusal(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_config_json_that_is_not_a_json_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


def test_missing_and_unknown_tensors_are_listed(folder):
    def change(tensors):
        for expert in range(8):
            del tensors[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"]
        tensors["model.layers.2.self_attn.sinks"] = np.zeros(6, np.float32)

    edit_tensors(folder, change)
    message = refusal(folder)
    assert "8 missing: model.layers.2.mlp.experts.0.up_proj.weight" in message and ", ..." in message
    assert "1 unknown: model.layers.2.self_attn.sinks" in message
    assert "experts.7" not in message


def test_wrong_shape(folder):
    edit_config(folder, moe_intermediate_size=12)
    assert "experts.0.gate_proj.weight has shape (10, 16): config.json asks for (12, 16)" in refusal(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(17, np.float32)}))
    assert "model.norm.weight has shape (17,): config.json asks for (16,)" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite(folder, dtype, value):
    name = "model.layers.3.mlp.experts.5.down_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][-1, -1] = value

    edit_tensors(folder, change)
    assert f"{name} holds NaN or infinity" in refusal(folder)


def test_overflow_of_a_cast(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.full(16, 1e5, np.float32)}))
    assert "model.norm.weight holds NaN or infinity as float16" in refusal(folder, dtype="float16")


def test_truncated_and_damaged_files(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    table_bytes = int.from_bytes(data[:8], "little")
    for cut in (0, 5, 8, 100, 8 + table_bytes, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert "truncated" in refusal(folder), cut
    path.write_bytes(data + b"\0")
    assert "damaged" in refusal(folder)
    path.write_bytes(data[:8] + b"x" + data[9:])
    assert "damaged table" in refusal(folder)
    path.write_bytes(data.replace(b'"shape":[16]', b'"shape":[15]', 1))
    assert "damaged table" in refusal(folder)
    path.write_bytes(data.replace(b'"F32"', b'"F64"', 1))
    assert "stored as F64" in refusal(folder)


@pytest.mark.parametrize(
    "entries",
    [[], 3, {"a": 1}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, {"a": {"shape": 1}}]
    + [
        {"a": {"dtype": "F32", "shape": shape, "data_offsets": span}}
        for shape, span in ((["x"], [0, 4]), ([1], ["0", 4]), ([-1, -1], [0, 4]), ([1], [-4, 0]))
    ]
    + [{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}],
)
def test_tables_of_the_wrong_kind(folder, entries):
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert str(folder / "model.safetensors") in refusal(folder)


def test_index_and_shards(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").rename(folder / "elsewhere.safetensors")
    message = refusal(folder)
    assert "model-00002-of-00003.safetensors is missing" in message and "model.safetensors.index.json" in message
    (folder / "elsewhere.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    (folder / "model-00001-of-00003.safetensors").write_bytes(
        (folder / "model-00002-of-00003.safetensors").read_bytes()
    )
    assert "is also in model-00001-of-00003.safetensors" in refusal(folder)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "no weight_map" in refusal(folder)


def test_memory_is_checked_before_it_is_taken(folder, monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(filling, "allocate", None)
    assert refusal(folder).endswith("GB of memory, 0.0 GB available: expected a smaller model")


def test_a_dtype_that_would_fit_is_named(folder, monkeypatch):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")

    class Memory:
        available = sum(one.size * (4 if "score_correction" in name else 2) for name, one in tensors.items())

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert "expected model.dtype=bfloat16, which needs 0.0 GB" in refusal(folder, dtype="float32")
    checkpoint.open(folder).read("bfloat16")


def test_unknown_dtype(folder):
    assert "bfloat16" in refusal(folder, dtype="int8")
