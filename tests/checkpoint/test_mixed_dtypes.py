"""Checkpoints whose tensors have different dtypes: kept as stored, nothing rounded, and everything runs."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.model import dtypes
from tests import tiny_model
from tests.family_variants import VARIANTS, write

TOKENS_BT = np.random.default_rng(0).integers(0, 64, (2, 9), dtype=np.int32)
# family, parts of the names of tensors in float32 (None: all but the embedding), parameters that are float32 then
MIXTURES = {
    "head": ("qwen3_moe", ["lm_head"], {"head_VD"}),
    "one expert": ("qwen3_moe", ["layers.1.mlp.experts.3.down_proj"], {"moe/experts/down_LEDF"}),
    "all but the embedding": ("qwen3_moe", None, None),
    "much": (
        "qwen2_moe",
        ["lm_head", "layers.1.mlp.experts.3.down_proj", "q_proj.weight", "v_proj.bias", "shared_expert_gate", "norm"],
        {
            *("head_VD", "norm_D", "moe/attention_norm_LD", "moe/ffn_norm_LD", "moe/experts/down_LEDF"),
            *("moe/attention/query_LHAD", "moe/attention/value_bias_LGA", "moe/shared_gate_LD"),
        },
    ),
    "latents": (
        "deepseek_v3",
        ["kv_b_proj", "embed_tokens"],
        {"embedding_VD", "dense/attention/key_value_up_LHOZ", "moe/attention/key_value_up_LHOZ"},
    ),
}


def mixed(folder, family, parts, narrow=ml_dtypes.bfloat16):
    """A folder whose tensors are float32 if their name has one of the parts, and narrow otherwise."""
    write(folder, VARIANTS[family], dtype="float32")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        wide = "embed_tokens" not in name if parts is None else any(part in name for part in parts)
        tensors[name] = (
            tensor * np.float32(1.001) if wide else tensor.astype(narrow)
        )  # values that no half precision holds
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    tiny_model.save_tokenizer(tiny_model.tokenizer(), folder, 64)
    return folder


@pytest.mark.parametrize("case", MIXTURES)
def test_wider_tensors_stay_wider(tmp_path, case):
    family, parts, wide = MIXTURES[case]
    folder = mixed(tmp_path / "model", family, parts)
    found, expected = (
        dict(huggingface.flattened(checkpoint.open(folder).read(dtype))) for dtype in ("auto", "float32")
    )
    in_float32 = {name for name, x in found.items() if x.dtype == np.float32 and not name.endswith("/bias_LE")}
    assert in_float32 == (wide or found.keys())
    for name, x in found.items():
        np.testing.assert_array_equal(x.astype(np.float32), expected[name], err_msg=name)
    assert dtypes.dtype_of(found) == (ml_dtypes.bfloat16 if wide else np.float32)


@pytest.mark.parametrize("case", ["much", "latents"])
def test_a_mixture_runs(tmp_path, case):
    folder = mixed(tmp_path / "model", *MIXTURES[case][:2])
    model, exact = moe_jax.load(folder), moe_jax.load(folder, dtype="float32")
    logits_BTV, exact_BTV = model.logits(TOKENS_BT), exact.logits(TOKENS_BT)
    assert np.linalg.norm(logits_BTV - exact_BTV) < 0.05 * np.linalg.norm(exact_BTV)
    [made] = model.generate([TOKENS_BT[0].tolist()], max_new_tokens=3)
    likely = model.logits(np.array([[*TOKENS_BT[0], *made.ids]] * 2))[0, 8:11]
    short_of_best = likely.max(axis=1) - likely[np.arange(3), list(made.ids)]
    assert short_of_best.max() < 0.02 * np.abs(likely).max()  # prefill and decode read the same weights


def test_a_float32_head_is_not_rounded(tmp_path):
    model = moe_jax.load(mixed(tmp_path / "model", "qwen3_moe", ["lm_head"]))
    head_VD = np.asarray(model.params["head_VD"], np.float64)
    x_BTD = np.linalg.lstsq(head_VD, model.logits(TOKENS_BT).reshape(-1, 64).T.astype(np.float64), rcond=None)[0]
    rounded = x_BTD.astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(x_BTD, rounded, atol=1e-5)  # bfloat16 activations times the head as it is stored


def test_bfloat16_and_float16_become_float32(tmp_path):
    folder = mixed(tmp_path / "model", "qwen3_moe", ["nothing"])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    params = checkpoint.open(folder).read()
    assert params["norm_D"].dtype == np.float32 and params["embedding_VD"].dtype == ml_dtypes.bfloat16


def test_tensors_narrower_than_most_are_widened(tmp_path):
    folder = mixed(tmp_path / "model", "qwen3_moe", None)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    params = checkpoint.open(folder).read()
    assert {x.dtype.name for _, x in huggingface.flattened(params)} == {"float32"}
    np.testing.assert_array_equal(params["embedding_VD"], tensors["model.embed_tokens.weight"].astype(np.float32))
    assert checkpoint.open(folder).stored_dtype == "float32"


def test_a_mixture_is_written_as_it_was_read(tmp_path):
    folder = mixed(tmp_path / "model", "qwen2_moe", ["lm_head", "mlp.gate."])
    moe_jax.load(folder).save(tmp_path / "saved")
    before, after = (safetensors.numpy.load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert {name: x.dtype for name, x in before.items()} == {name: x.dtype for name, x in after.items()}
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)
