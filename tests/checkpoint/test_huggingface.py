"""Folders in Hugging Face layout: a round trip keeps everything, and every tensor has its published name."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.dims import LETTERS
from moe_jax.model.decoder import Decoder
from tests import tiny_model
from tests.checkpoint.tiny_folder import (
    PLAIN,
    TINY,
    edit_config,
    edit_tensors,
    flattened,
    random_params,
    refusal,
    shard,
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


def bits(array):
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


@pytest.mark.parametrize("architecture", [TINY, PLAIN], ids=["everything", "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip_is_bitwise(tmp_path, architecture, dtype):
    params = random_params(architecture, np.dtype(dtype))
    huggingface.write_checkpoint(tmp_path / "model", architecture, huggingface.nested(params), dtype=dtype)
    opened = checkpoint.open(tmp_path / "model")
    architecture_read, read = opened.architecture, opened.read()
    assert architecture_read == architecture
    read = flattened(read)
    assert read.keys() == params.keys()
    for name, array in params.items():
        assert read[name].dtype == array.dtype, name
        np.testing.assert_array_equal(bits(read[name]), bits(array), err_msg=name)


def test_every_tensor_has_its_published_name_and_layout(folder):
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


def test_harmless_fields_pass(folder):
    edit_config(folder, sliding_window=None, layer_types=["full_attention"] * 4, use_cache=False, something_new=3)
    assert checkpoint.open(folder).architecture == TINY


def test_largest_finite_values_pass(folder):
    name = "model.norm.weight"
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        largest = np.full(16, ml_dtypes.finfo(dtype).max, dtype)
        edit_tensors(folder, lambda tensors, largest=largest: tensors.update({name: largest}))
        np.testing.assert_array_equal(checkpoint.open(folder).read()["norm_D"], largest)


def test_multi_token_prediction_layers_are_named_as_skipped(folder, caplog):
    extra = {"model.layers.4.eh_proj.weight": np.zeros((16, 32), np.float32)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    assert "1 unknown: model.layers.4.eh_proj.weight" in refusal(folder)
    edit_config(folder, num_nextn_predict_layers=1)
    with caplog.at_level("WARNING"):
        checkpoint.open(folder).read()
    assert "skipped 1 tensors of model.layers.4.* (a multi-token prediction layer)" in caplog.text
