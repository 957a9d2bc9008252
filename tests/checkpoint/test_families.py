"""Every family: config.json round trips, rules name the decoder's parameters, unsupported fields are refused."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.architecture import Architecture
from moe_jax.model import rope
from moe_jax.model.decoder import Decoder
from tests.family_variants import VARIANTS, random_params, write

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAMILY_VARIANT = {variant.model_type: name for name, variant in reversed(VARIANTS.items())}  # one of each family


def fields_of(model_type, **changes):
    variant = VARIANTS[FAMILY_VARIANT[model_type]]
    return FAMILIES[model_type].config_json(variant.architecture) | changes


def changed(architecture, section, **settings):
    return dataclasses.replace(
        architecture, **{section: dataclasses.replace(getattr(architecture, section), **settings)}
    )


def test_every_family_has_a_variant():
    assert FAMILY_VARIANT.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_config_json_round_trip(name):
    model_type, architecture = VARIANTS[name]
    family = FAMILIES[model_type]
    fields = json.loads(json.dumps(family.config_json(architecture)))
    assert fields["model_type"] == model_type
    assert family.architecture(fields) == architecture
    fewer = changed(architecture, "moe", k=1)
    assert family.config_json(fewer) == fields | {"num_experts_per_tok": 1}


@pytest.mark.parametrize("name", VARIANTS)
def test_older_readers_find_theta_and_scaling(name):
    """Published files have `rope_theta` and `rope_scaling`; transformers 5 has `rope_parameters`."""
    model_type, architecture = VARIANTS[name]
    fields = FAMILIES[model_type].config_json(architecture)
    for left_out in ("rope_parameters",), ("rope_theta", "rope_scaling"):
        some = {key: value for key, value in fields.items() if key not in left_out}
        assert FAMILIES[model_type].architecture(some) == architecture


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_name_what_the_decoder_owns(name):
    model_type, architecture = VARIANTS[name]
    made = nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0)))
    owned = {path: array.shape for path, array in huggingface.flattened(nnx.to_pure_dict(nnx.state(made)))}
    rules = FAMILIES[model_type].rules(architecture)
    assert {rule.parameter: rule.shape(architecture) for rule in rules} == owned


@pytest.mark.parametrize("name", VARIANTS)
def test_a_written_folder_is_read(tmp_path, name):
    write(tmp_path / "model", VARIANTS[name])
    opened = checkpoint.open(tmp_path / "model")
    architecture, params = opened.architecture, opened.read("float32")
    assert architecture == VARIANTS[name].architecture
    expected = dict(huggingface.flattened(random_params(VARIANTS[name])))
    for path, array in huggingface.flattened(params):
        np.testing.assert_array_equal(array, expected.pop(path), err_msg=path)
    assert not expected


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "deepseek_v2"])
def test_prediction_layers_and_computed_frequencies_are_skipped(tmp_path, caplog, model_type):
    folder = write(tmp_path / "model", VARIANTS[FAMILY_VARIANT[model_type]])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    skipped = ["layers.1.self_attn.rotary_emb"]
    if model_type != "deepseek_v2":
        tensors["model.layers.3.eh_proj.weight"] = np.ones((2, 2), np.float32)
        skipped.append("layers.3.")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    checkpoint.open(folder).read()
    assert all(name in caplog.text for name in skipped)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"clip_qkv": "8"}, ["clip_qkv", '"8"']),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"attention_sinks": True}, ["attention_sinks"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type", "linear"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["rope_scaling.rope_type", "llama3"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling.rope_type", "longrope"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type", "dynamic"]),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, ["rope_scaling.attention_factor", "1.5"]),
        ({"rope_scaling": YARN | {"truncate": False}}, ["rope_scaling.truncate", "false"]),
        ({"rope_scaling": YARN | {"factor": None}}, ["rope_scaling.factor", "missing"]),
        ({"rope_scaling": YARN | {"factor": 0.5}}, ["attention.yarn_factor", "0.5"]),
        ({"num_experts_per_tok": 99}, ["moe.k", "99"]),
        ({"num_hidden_layers": 0}, ["decoder.num_layers"]),
    ],
)
def test_unsupported_settings_are_refused_by_name(model_type, fields, words):
    with pytest.raises(ValueError) as refused:
        FAMILIES[model_type].architecture(fields_of(model_type, **fields))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("mixtral", {"sliding_window": 4096}, ["sliding_window", "4096"]),
        ("olmoe", {"sliding_window": 4096}, ["sliding_window", "4096"]),
        ("olmoe", {"attention_bias": True}, ["attention_bias"]),
        ("olmoe", {"head_dim": 16}, ["head_dim", "16"]),
        ("qwen3_moe", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, ["mlp_only_layers", '["1"]']),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, ["decoder.num_dense_layers", "3"]),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
        ("qwen3_moe", {"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000"]),
        ("olmoe", {"clip_qkv": 0}, ["clip_qkv", "0"]),
        ("olmoe", {"clip_qkv": float("inf")}, ["clip_qkv", "inf"]),
        ("qwen3_moe", {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}, ["attention.yarn_mscale_all_dim"]),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size"]),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, ["shared_expert_intermediate_size", "missing"]),
        ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob"]),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, ["topk_method", "noaux_tc"]),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid"]),
        ("deepseek_v2", {"rope_interleave": False}, ["rope_interleave"]),
        ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method", "greedy"]),
        ("deepseek_v3", {"num_key_value_heads": 2}, ["num_key_value_heads", "2"]),
        ("deepseek_v3", {"attention_bias": True}, ["attention_bias"]),
        ("deepseek_v3", {"n_group": 3}, ["moe.num_groups", "3"]),
        ("deepseek_v3", {"moe_layer_freq": 0}, ["moe_layer_freq", "0"]),
        ("deepseek_v3", {"moe_layer_freq": [0, 1]}, ["moe_layer_freq", "[0, 1]"]),
        ("glm4_moe", {"moe_layer_freq": 2}, ["moe_layer_freq", "2"]),
        ("glm4_moe", {"moe_layer_freq": [0, 1, 1], "first_k_dense_replace": "1"}, ["first_k_dense_replace", '"1"']),
        ("qwen3_moe", {"clip_qkv": 8.0}, ["clip_qkv", "8.0"]),
        ("kimi_k2", {"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers", "-1"]),
    ],
)
def test_settings_that_one_family_refuses(model_type, fields, words):
    with pytest.raises(ValueError) as refused:
        FAMILIES[model_type].architecture(fields_of(model_type, **fields))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_settings_that_change_nothing_are_accepted():
    """Published Qwen files name a window that they do not use."""
    family, architecture = FAMILIES["qwen3_moe"], VARIANTS["qwen3_moe"].architecture
    fields = fields_of("qwen3_moe", sliding_window=4096, max_window_layers=28, use_sliding_window=False)
    assert family.architecture(fields) == architecture
    greedy = fields_of("deepseek_v2", topk_method="greedy", n_group=4, topk_group=2)
    assert FAMILIES["deepseek_v2"].architecture(greedy).moe.num_groups == 1


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 3},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1, "attention_factor": None}},
        {"quantization_config": None},
    ],
    ids=str,
)
def test_fields_that_newer_libraries_add_change_nothing(model_type, fields):
    plain = fields_of(model_type)
    plain = {name: x for name, x in plain.items() if name not in ("rope_parameters", "rope_scaling")}
    family = FAMILIES[model_type]
    assert family.architecture(plain | fields) == family.architecture(plain)


def test_rotations_by_kind_of_layer():
    """The format of transformers 5 for families that may have several kinds."""
    plain = fields_of("qwen3_moe")
    nested = plain | {"rope_parameters": {"full_attention": plain["rope_parameters"]}}
    nested = {name: x for name, x in nested.items() if name != "rope_theta"}
    assert FAMILIES["qwen3_moe"].architecture(nested) == VARIANTS["qwen3_moe"].architecture
    nested["rope_parameters"]["sliding_attention"] = plain["rope_parameters"]
    with pytest.raises(ValueError, match=r"rope_parameters\.full_attention = .* not implemented"):
        FAMILIES["qwen3_moe"].architecture(nested)


@pytest.mark.parametrize("name", ["qwen3_moe_yarn", "deepseek_v2_lite", "deepseek_v3", "kimi_k2"])
def test_the_scale_of_yarn_may_be_given(name):
    model_type, architecture = VARIANTS[name]
    fields = FAMILIES[model_type].config_json(architecture)
    own = rope.rotary_scale(architecture.attention)
    for scale, accepted in ((own, True), (round(own, 8), True), (own * 1.001, False)):
        with_scale = fields | {"rope_scaling": fields["rope_scaling"] | {"attention_factor": scale}}
        if accepted:
            assert FAMILIES[model_type].architecture(with_scale) == architecture
        else:
            with pytest.raises(ValueError, match=r"rope_scaling\.attention_factor = .*: expected"):
                FAMILIES[model_type].architecture(with_scale)


def test_dense_layers_may_be_listed_and_groups_be_null():
    family, plain = FAMILIES["deepseek_v3"], fields_of("deepseek_v3")
    assert family.architecture(plain | {"moe_layer_freq": [0, 1, 1]}) == family.architecture(plain)
    without = family.architecture(plain | {"n_group": None, "topk_group": None})
    assert (without.moe.num_groups, without.moe.num_groups_kept) == (1, 1)
    absent = family.architecture({name: x for name, x in plain.items() if "group" not in name})
    assert (absent.moe.num_groups, absent.moe.num_groups_kept) == (8, 4)


@pytest.mark.parametrize(
    ("model_type", "fields", "dense"),
    [
        ("qwen3_moe", {"mlp_only_layers": [5, 2]}, (2, 5)),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, (0, 1)),
        ("qwen2_moe", {"decoder_sparse_step": 2}, (0, 2, 4)),
        ("qwen2_moe", {"decoder_sparse_step": 3, "mlp_only_layers": [5, 0]}, (0, 1, 3, 4, 5)),
        ("deepseek_v2", {"moe_layer_freq": 2}, (0, 1, 3, 5)),
        ("deepseek_v3", {"moe_layer_freq": 2, "first_k_dense_replace": 3}, (0, 1, 2, 3, 5)),
        ("deepseek_v3", {"moe_layer_freq": [0, 1, 0, 1, 1, 0], "first_k_dense_replace": 0}, (0, 2, 5)),
        ("kimi_k2", {"moe_layer_freq": [1, 1, 0, 1, 1, 1], "first_k_dense_replace": 1}, (0, 2)),
    ],
    ids=str,
)
def test_any_layer_may_be_dense(model_type, fields, dense):
    """Decided as in the models' own code, and kept in a round trip."""
    family = FAMILIES[model_type]
    architecture = family.architecture(fields_of(model_type, num_hidden_layers=6, **fields))
    decoder = architecture.decoder
    assert decoder.num_dense_layers == len(dense)
    assert (decoder.dense_layers or tuple(range(len(dense)))) == dense
    assert bool(decoder.dense_layers) == (dense != tuple(range(len(dense))))
    written = json.loads(json.dumps(family.config_json(architecture)))
    assert family.architecture(written) == architecture
    if model_type == "deepseek_v3" and isinstance(fields["moe_layer_freq"], int):
        assert written["moe_layer_freq"] == fields["moe_layer_freq"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_architecture_of_another_family_is_not_written(model_type):
    """The shape of every other family is refused by name, or comes back unchanged."""
    family, refused = FAMILIES[model_type], 0
    for architecture in [*(variant.architecture for variant in VARIANTS.values()), Architecture()]:
        try:
            fields = family.config_json(architecture)
        except ValueError as error:
            assert model_type in str(error) or "head_dim" in str(error)
            refused += 1
        else:
            again = family.architecture(fields)
            if not architecture.decoder.num_dense_layers:
                again, architecture = (changed(one, "decoder", dense_hidden=1) for one in (again, architecture))
            if architecture.moe.num_groups == 1:
                again, architecture = (changed(one, "moe", group_score="best") for one in (again, architecture))
            assert again == architecture
    assert refused > len(VARIANTS) / 2
