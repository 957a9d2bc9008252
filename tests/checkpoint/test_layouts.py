"""Other layouts than the published one: read to the same parameters, or refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from tests.family_variants import VARIANTS, write

ONE_OF_EACH = {variant.model_type: name for name, variant in reversed(VARIANTS.items())}
TIED = "olmoe_few_kv_heads"


def edited(folder, change):
    """Rewrites the tensors of a folder."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(change(tensors), folder / "model.safetensors")
    return folder


def stacked(tensors, turned=False):
    """All experts of a layer in two tensors, as in transformers 5; `turned`: inputs first, as in some others."""
    made, experts = {}, {}
    for name, x in tensors.items():
        if ".experts." not in name:
            made[name.replace("block_sparse_moe", "mlp")] = x
            continue
        layer, rest = name.split(".experts.")
        number, matrix, _ = rest.split(".")
        layer = layer.replace("block_sparse_moe", "mlp")
        experts.setdefault(layer, {}).setdefault(int(number), {})[matrix] = x
    for layer, tensors in experts.items():
        each = [tensors[number] for number in sorted(tensors)]
        gate, up, down = ("w1", "w3", "w2") if "w1" in each[0] else ("gate_proj", "up_proj", "down_proj")
        gate_up = np.stack([np.concatenate([one[gate], one[up]]) for one in each])
        both = {"gate_up_proj": gate_up, "down_proj": np.stack([one[down] for one in each])}
        for name, x in both.items():
            made[f"{layer}.experts.{name}"] = np.ascontiguousarray(x.swapaxes(1, 2)) if turned else x
    return made


def assert_same_parameters(folder, variant):
    read = dict(huggingface.flattened(checkpoint.open(folder).read()))
    write(folder.with_name("plain"), variant)
    expected = dict(huggingface.flattened(checkpoint.open(folder.with_name("plain")).read()))
    assert read.keys() == expected.keys()
    for name, x in expected.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x, err_msg=name)


def refusal(folder):
    with pytest.raises(ValueError) as refused:
        checkpoint.open(folder).read()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_in_one_tensor(tmp_path, model_type):
    variant = VARIANTS[ONE_OF_EACH[model_type]]
    folder = edited(write(tmp_path / "model", variant), stacked)
    assert_same_parameters(folder, variant)
    assert set(safetensors.numpy.load_file(folder / "model.safetensors")) != set(
        safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    )


def test_experts_stored_inputs_first_are_refused_by_name(tmp_path):
    folder = edited(write(tmp_path / "model", VARIANTS["qwen3_moe"]), lambda tensors: stacked(tensors, turned=True))
    assert "gate_up_proj has shape (16, 32, 24): config.json asks for (16, 24, 32): its matrices" in refusal(folder)


def test_one_layer_in_another_layout_is_named(tmp_path):
    def some(tensors):
        mixed = stacked(tensors)
        return {name: x for name, x in tensors.items() if "layers.1." not in name} | {
            name: x for name, x in mixed.items() if "layers.1." in name
        }

    message = refusal(edited(write(tmp_path / "model", VARIANTS["qwen3_moe"]), some))
    assert "48 missing: model.layers.1.mlp.experts.0.down_proj.weight" in message
    assert "2 unknown: model.layers.1.mlp.experts.down_proj" in message


NAMES = {  # prefixes of the names of the decoder, and of the head
    "without model.": ("", "lm_head.weight"),
    "within a model that sees": ("language_model.model.", "language_model.lm_head.weight"),
    "as in transformers 5": ("model.language_model.", "lm_head.weight"),
    "of the decoder alone": ("language_model.", "language_model.lm_head.weight"),
    "of a compiled model": ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
}


def renamed(start, head):
    def change(tensors):
        return {
            head if name == "lm_head.weight" else start + name.removeprefix("model."): x for name, x in tensors.items()
        }

    return change


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("name", ["qwen3_moe", TIED])
def test_names_with_other_prefixes(tmp_path, caplog, case, name):
    folder = edited(write(tmp_path / "model", VARIANTS[name]), renamed(*NAMES[case]))
    assert_same_parameters(folder, VARIANTS[name])
    assert f"{NAMES[case][0]}embed_tokens.weight and others are read as model.embed_tokens.weight" in caplog.text


def test_prediction_layers_are_skipped_under_other_names(tmp_path):
    """They have their own embedding."""

    def change(tensors):
        extra = {"model.layers.3.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
        return renamed("language_model.model.", "language_model.lm_head.weight")(tensors | extra)

    folder = edited(write(tmp_path / "model", VARIANTS["deepseek_v3"]), change)
    fields = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    assert_same_parameters(folder, VARIANTS["deepseek_v3"])


def test_other_parts_beside_a_language_model_are_named(tmp_path):
    def change(tensors):
        extra = {"vision_tower.blocks.0.norm.weight": np.ones(4, np.float32)}
        return renamed("language_model.model.", "language_model.lm_head.weight")(tensors) | extra

    folder = edited(write(tmp_path / "model", VARIANTS["qwen3_moe"]), change)
    assert "1 unknown: vision_tower.blocks.0.norm.weight" in refusal(folder)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    def change(tensors):
        return {name.removeprefix("model."): x for name, x in tensors.items()} | {
            "model.norm.weight": tensors["model.norm.weight"]
        }

    folder = edited(write(tmp_path / "model", VARIANTS["qwen3_moe"]), change)
    assert "unknown: model.model.norm.weight" in refusal(folder)

    def twice(tensors):
        both = renamed("language_model.model.", "language_model.lm_head.weight")(tensors)
        return both | {"lm_head.weight": tensors["lm_head.weight"]}

    folder = edited(write(tmp_path / "twice", VARIANTS["qwen3_moe"]), twice)
    assert "is one of two tensors that would be lm_head.weight" in refusal(folder)


def test_a_model_without_a_head_is_refused_by_name(tmp_path):
    def change(tensors):
        return {name.removeprefix("model."): x for name, x in tensors.items() if name != "lm_head.weight"}

    folder = edited(write(tmp_path / "model", VARIANTS["qwen3_moe"]), change)
    assert refusal(folder).endswith("1 missing: lm_head.weight; this is a model without its output head")


def test_a_nested_language_model_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "model", VARIANTS["deepseek_v3"])
    inner = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_vl", "text_config": inner}))
    message = refusal(folder)
    assert 'model_type = "kimi_vl" has a language model of type "deepseek_v3" in text_config' in message
    assert "supported: deepseek_v2" in message
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"model_type": "llama"}}))
    assert 'model_type = "llava": supported: ' in refusal(folder)


# integers, which are not weights

INTEGERS = [(np.int64, "I64"), (np.int32, "I32"), (np.uint8, "U8"), (np.bool_, "BOOL")]


@pytest.mark.parametrize(("dtype", "code"), INTEGERS)
def test_a_tensor_of_integers_is_named(tmp_path, dtype, code):
    name = "model.layers.1.mlp.experts.0.down_proj.qweight"
    folder = edited(
        write(tmp_path / "model", VARIANTS["qwen3_moe"]), lambda tensors: tensors | {name: np.ones((2, 3), dtype)}
    )
    assert f"1 unknown: {name} ({code})" in refusal(folder)
    assert checkpoint.open(folder).stored_dtype == "bfloat16"


def test_a_weight_of_integers_is_refused_by_name(tmp_path):
    folder = edited(
        write(tmp_path / "model", VARIANTS["qwen3_moe"]),
        lambda tensors: tensors | {"model.norm.weight": np.ones(32, np.int8)},
    )
    assert "tensor model.norm.weight is stored as I8: expected one of F32, F16, BF16" in refusal(folder)


def test_scales_in_integers_are_refused(tmp_path):
    name = "model.layers.0.mlp.experts.0.down_proj.weight"

    def change(tensors):
        small = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        return tensors | {name: small, f"{name}_scale_inv": np.ones((1, 1), np.uint8)}

    folder = edited(write(tmp_path / "model", VARIANTS["qwen3_moe"]), change)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(fields))
    assert f"{name}_scale_inv has shape (1, 1) and dtype uint8: expected (1, 1), a float32" in refusal(folder)
