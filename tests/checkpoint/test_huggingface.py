"""Reading and writing a folder in Hugging Face layout: what comes back, and what is refused."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import psutil
import pytest
import safetensors.numpy
from flax import nnx

from moe_jax import checkpoint
from moe_jax.checkpoint import filling, huggingface, safetensors_file
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.dims import LETTERS
from moe_jax.model.decoder import Decoder
from tests import tiny_model

TINY = Architecture(
    DecoderConfig(
        vocab_size=40,
        d_model=16,
        num_layers=4,
        num_dense_layers=2,
        dense_hidden=24,
        tie_embeddings=False,
        max_context=64,
        norm_eps=2e-6,
    ),
    AttentionConfig(
        num_heads=6, num_kv_heads=2, head_dim=8, qk_norm=True, bias=True, rope_theta=5e5, rope_fraction=0.5
    ),
    MoEConfig(
        num_experts=8,
        k=3,
        expert_hidden=10,
        num_shared_experts=2,
        num_groups=4,
        num_groups_kept=2,
        normalize=False,
        routed_scaling=2.5,
    ),
)
PLAIN = Architecture(
    dataclasses.replace(TINY.decoder, num_layers=2, num_dense_layers=0, tie_embeddings=True),
    dataclasses.replace(TINY.attention, qk_norm=False, bias=False, rope_fraction=1.0),
    dataclasses.replace(TINY.moe, num_shared_experts=0, num_groups=1, num_groups_kept=1, normalize=True),
)
# What zai-org/GLM-4.5-Air publishes.
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def random_params(architecture, dtype):
    """A flat tree of normal numbers, the router's bias in float32."""
    random = np.random.default_rng(0)
    return {
        rule.parameter: random.standard_normal(rule.shape(architecture)).astype(np.float32 if rule.float32 else dtype)
        for rule in FAMILIES["glm4_moe"].rules(architecture)
    }


def flattened(params):
    return dict(huggingface.flattened(params))


def nested(flat):
    return huggingface.nested(flat)


def bits(array):
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


@pytest.fixture
def folder(tmp_path):
    """A valid checkpoint to break."""
    huggingface.write_checkpoint(tmp_path / "model", TINY, nested(random_params(TINY, np.float32)), dtype="float32")
    return tmp_path / "model"


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change):
    """Rewrites model.safetensors with the format's own library."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def shard(folder, parts=3):
    """Splits the weights the way published checkpoints are."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = dict(list(tensors.items())[part::parts])
        safetensors.numpy.save_file(chosen, folder / name)
        weight_map |= dict.fromkeys(chosen, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(folder, **options):
    """The one line that reading `folder` is refused with."""
    with pytest.raises(ValueError) as caught:
        checkpoint.open(folder).read(**options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("architecture", [TINY, PLAIN], ids=["everything", "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip_is_bitwise(tmp_path, architecture, dtype):
    params = random_params(architecture, np.dtype(dtype))
    huggingface.write_checkpoint(tmp_path / "model", architecture, nested(params), dtype=dtype)
    opened = checkpoint.open(tmp_path / "model")
    architecture_read, read = opened.architecture, opened.read()
    assert architecture_read == architecture
    read = flattened(read)
    assert read.keys() == params.keys()
    for name, array in params.items():
        assert read[name].dtype == array.dtype, name
        np.testing.assert_array_equal(bits(read[name]), bits(array), err_msg=name)


def test_auto_writes_what_it_is_given_and_dtypes_convert(tmp_path):
    params = random_params(TINY, np.dtype(ml_dtypes.bfloat16))
    huggingface.write_checkpoint(tmp_path / "model", TINY, nested(params), dtype="auto")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    read = flattened(checkpoint.open(tmp_path / "model").read(dtype="float32"))
    assert {array.dtype.name for array in read.values()} == {"float32"}
    np.testing.assert_array_equal(read["moe/experts/down_LEDF"], params["moe/experts/down_LEDF"].astype(np.float32))
    read = flattened(checkpoint.open(tmp_path / "model").read(dtype="float16"))
    assert {name for name, array in read.items() if array.dtype != np.float16} == {"moe/router/bias_LE"}


def test_every_tensor_lies_where_the_published_name_says(folder):
    """Against the format's own library, tensor by tensor, with the layouts written out by hand."""
    params = random_params(TINY, np.float32)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    gate_up, down = params["moe/experts/gate_up_LEIFD"], params["moe/experts/down_LEDF"]
    expected = {
        "model.embed_tokens.weight": params["embedding_VD"],
        "model.norm.weight": params["norm_D"],
        "lm_head.weight": params["head_VD"],
    }
    for layer in range(4):
        stack, at = ("dense", layer) if layer < 2 else ("moe", layer - 2)
        names = f"model.layers.{layer}"
        attention = {name.split("/")[-1]: x[at] for name, x in params.items() if name.startswith(f"{stack}/attention")}
        expected |= {
            f"{names}.input_layernorm.weight": attention["attention_norm_LD"],
            f"{names}.post_attention_layernorm.weight": params[f"{stack}/ffn_norm_LD"][at],
            f"{names}.self_attn.q_proj.weight": attention["query_LHAD"].reshape(48, 16),
            f"{names}.self_attn.k_proj.weight": attention["key_LGAD"].reshape(16, 16),
            f"{names}.self_attn.v_proj.weight": attention["value_LGAD"].reshape(16, 16),
            f"{names}.self_attn.o_proj.weight": attention["output_LDHA"].reshape(16, 48),
            f"{names}.self_attn.q_proj.bias": attention["query_bias_LHA"].reshape(48),
            f"{names}.self_attn.k_proj.bias": attention["key_bias_LGA"].reshape(16),
            f"{names}.self_attn.v_proj.bias": attention["value_bias_LGA"].reshape(16),
            f"{names}.self_attn.q_norm.weight": attention["query_norm_LA"],
            f"{names}.self_attn.k_norm.weight": attention["key_norm_LA"],
        }
        if stack == "dense":
            feed_forwards = {"mlp": (params["dense/ffn/gate_up_LIFD"][at], params["dense/ffn/down_LDF"][at])}
        else:
            feed_forwards = {f"mlp.experts.{e}": (gate_up[at, e], down[at, e]) for e in range(8)}
            shared = params["moe/shared/gate_up_LIFD"][at], params["moe/shared/down_LDF"][at]
            feed_forwards["mlp.shared_experts"] = shared
            expected[f"{names}.mlp.gate.weight"] = params["moe/router/weight_LED"][at]
            expected[f"{names}.mlp.gate.e_score_correction_bias"] = params["moe/router/bias_LE"][at]
        for name, (gate_up_IFD, down_DF) in feed_forwards.items():
            expected[f"{names}.{name}.gate_proj.weight"] = gate_up_IFD[0]
            expected[f"{names}.{name}.up_proj.weight"] = gate_up_IFD[1]
            expected[f"{names}.{name}.down_proj.weight"] = down_DF
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)


def test_rules_use_the_letters_of_dims():
    for family in FAMILIES.values():
        for rule in family.rules(TINY):
            assert set(rule.letters) <= set(LETTERS), rule
            spelled = {letter for letter in LETTERS if f"{{{letter}}}" in rule.tensor}
            stored = set(rule.stored) - {" ", "1"}
            assert sorted(rule.letters) == sorted([*spelled, *stored]), rule


@pytest.mark.parametrize("architecture", [TINY, PLAIN], ids=["everything", "plain"])
def test_rules_name_what_the_decoder_owns(architecture):
    made = nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0)))
    owned = {path: array.shape for path, array in flattened(nnx.to_pure_dict(nnx.state(made))).items()}
    rules = FAMILIES["glm4_moe"].rules(architecture)
    assert {rule.parameter: rule.shape(architecture) for rule in rules} == owned


def test_shards_read_as_one_file_does(folder):
    whole = flattened(checkpoint.open(folder).read())
    shard(folder)
    parts = flattened(checkpoint.open(folder).read())
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)


def test_the_stored_dtype_is_that_of_most_numbers(tmp_path):
    """The selection bias is float32 in any case."""
    for dtype in ("bfloat16", "float16", "float32"):
        tiny_model.write_model(tmp_path / dtype, dtype=dtype)
        assert checkpoint.open(tmp_path / dtype).stored_dtype == dtype


def test_another_k_in_each_layer_is_written_and_read(tmp_path):
    architecture = tiny_model.changed(moe={"k": 5, "k_of_layers": (5, 2)})
    path = tiny_model.write_model(tmp_path / "model", architecture)
    assert checkpoint.open(path).architecture == architecture
    fields = json.loads((path / "config.json").read_text())
    assert fields["num_experts_per_tok"] == 5
    for wrong in ([5, 2, 2], [5], [3, 2], [5, 0], "5,2", [5.0, 2]):
        (path / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok_of_layers": wrong}))
        with pytest.raises(ValueError, match=r"config.json: .*(k_of_layers|tok_of_layers)"):
            checkpoint.open(path)


def test_mixed_dtypes_of_one_parameter_become_float32(folder):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(ml_dtypes.bfloat16)}))
    read = flattened(checkpoint.open(folder).read())
    assert read["dense/attention/query_LHAD"].dtype == np.float32


def test_bfloat16_bias_is_read_as_float32(folder):
    def narrow(tensors):
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})

    edit_tensors(folder, narrow)
    read = flattened(checkpoint.open(folder).read())
    assert {name for name, array in read.items() if array.dtype == np.float32} == {"moe/router/bias_LE"}


def test_published_config_json():
    family = FAMILIES["glm4_moe"]
    architecture = family.architecture(GLM_4_5_AIR)
    assert architecture == Architecture(
        DecoderConfig(
            vocab_size=151552,
            d_model=4096,
            num_layers=46,
            num_dense_layers=1,
            dense_hidden=10944,
            norm_eps=1e-5,
            tie_embeddings=False,
            max_context=131072,
        ),
        AttentionConfig(
            num_heads=96, num_kv_heads=8, head_dim=128, qk_norm=False, bias=True, rope_theta=1e6, rope_fraction=0.5
        ),
        MoEConfig(num_experts=128, k=8, expert_hidden=1408, num_shared_experts=1, normalize=True, routed_scaling=1.0),
    )
    assert family.architecture(family.config_json(architecture)) == architecture
    nested_rope = {name: value for name, value in GLM_4_5_AIR.items() if not name.startswith(("rope", "partial"))}
    nested_rope["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert family.architecture(nested_rope) == architecture


@pytest.mark.parametrize("architecture", [TINY, PLAIN, Architecture()], ids=["everything", "plain", "default"])
def test_config_json_round_trip(architecture):
    family = FAMILIES["glm4_moe"]
    fields = json.loads(json.dumps(family.config_json(architecture)))
    assert fields["num_experts_per_tok"] == architecture.moe.k
    assert family.architecture(fields) == architecture


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
def test_config_json_that_asks_for_something_else_is_refused_by_name(folder, fields, words):
    edit_config(folder, **fields)
    message = refusal(folder)
    for word in ["config.json", *words]:
        assert word in message
    with pytest.raises(ValueError):
        checkpoint.open(folder)


def test_harmless_fields_pass(folder):
    edit_config(folder, sliding_window=None, layer_types=["full_attention"] * 4, use_cache=False, something_new=3)
    assert checkpoint.open(folder).architecture == TINY


@pytest.mark.parametrize(
    ("setting", "value"), [("score", "softmax"), ("selection_bias", False)], ids=["score", "selection_bias"]
)
def test_an_architecture_that_the_family_lacks_is_not_written(tmp_path, setting, value):
    architecture = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, **{setting: value}))
    with pytest.raises(ValueError, match=rf"moe\.{setting}.*glm4_moe"):
        huggingface.write_checkpoint(tmp_path / "model", architecture, nested(random_params(TINY, np.float32)))
    assert not (tmp_path / "model").exists()


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


def test_largest_finite_values_pass(folder):
    name = "model.norm.weight"
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        largest = np.full(16, ml_dtypes.finfo(dtype).max, dtype)
        edit_tensors(folder, lambda tensors, largest=largest: tensors.update({name: largest}))
        np.testing.assert_array_equal(checkpoint.open(folder).read()["norm_D"], largest)


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


def test_multi_token_prediction_layers_are_named_as_skipped(folder, caplog):
    extra = {"model.layers.4.eh_proj.weight": np.zeros((16, 32), np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    assert "1 unknown: model.layers.4.eh_proj.weight" in refusal(folder)
    edit_config(folder, num_nextn_predict_layers=1)
    with caplog.at_level("WARNING"):
        checkpoint.open(folder).read()
    assert "skipped 1 tensors of model.layers.4.* (a multi-token prediction layer)" in caplog.text


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


def test_token_ids_and_extra_files(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    params = nested(random_params(TINY, np.float32))
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
    params = nested(random_params(TINY, np.float32))
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
        huggingface.write_checkpoint(tmp_path / "new", TINY, nested(broken))
    monkeypatch.setattr(safetensors_file.json, "dumps", None)
    with pytest.raises(TypeError):
        huggingface.write_checkpoint(folder, TINY, nested(params), replace=True)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    checkpoint.open(folder).read()


def test_params_that_do_not_fit_the_architecture_are_not_written(tmp_path):
    params = random_params(TINY, np.float32)
    for change, words in (
        ({"norm_D": np.zeros(15, np.float32)}, r"norm_D has shape \(15,\).*\(16,\)"),
        ({"moe/sinks_LH": np.zeros((2, 6), np.float32)}, "1 unknown: moe/sinks_LH"),
        ({"norm_D": np.zeros(16, np.int32)}, "norm_D is int32"),
    ):
        with pytest.raises(ValueError, match=words):
            huggingface.write_checkpoint(tmp_path / "model", TINY, nested(params | change), dtype="auto")
    del params["dense/ffn/down_LDF"]
    with pytest.raises(ValueError, match="1 missing: dense/ffn/down_LDF"):
        huggingface.write_checkpoint(tmp_path / "model", TINY, nested(params))
    assert not pathlib.Path(tmp_path / "model").exists()


def test_jax_arrays_are_written_as_numpy_ones_are(tmp_path):
    import jax.numpy as jnp

    params = random_params(PLAIN, np.dtype(ml_dtypes.bfloat16))
    arrays = {name: jnp.asarray(array) for name, array in params.items()}
    huggingface.write_checkpoint(tmp_path / "jax", PLAIN, nested(arrays))
    huggingface.write_checkpoint(tmp_path / "numpy", PLAIN, nested(params))
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("jax", "numpy")]
    assert read[0] == read[1]


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10_000])
def test_large_models_are_written_in_shards(tmp_path, folder, shard_bytes):
    params = nested(random_params(TINY, np.float32))
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
