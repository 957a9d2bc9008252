"""Redundant tensors: ignored where they agree with the model, refused where they do not."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface, redundant
from moe_jax.model import rope
from tests.family_variants import VARIANTS, write

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED, YARN = VARIANTS["olmoe_few_kv_heads"], VARIANTS["qwen3_moe_yarn"]


def with_tensors(folder, variant, change):
    """A folder with additional tensors."""
    write(folder, variant)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors | change(tensors), folder / "model.safetensors")
    return folder


def last_bit(x):
    changed = x.copy()
    changed.view(np.uint16)[-1, -1] ^= 1
    return changed


def frequencies(dtype=np.float32):
    return rope.frequencies(YARN.architecture.attention).astype(dtype)


AGREE = {
    "the head of a tied embedding": (TIED, lambda tensors: {HEAD: tensors[EMBEDDING]}),
    "the same in another dtype": (TIED, lambda tensors: {HEAD: tensors[EMBEDDING].astype(np.float32)}),
    "frequencies": (YARN, lambda tensors: {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies()}),
    "frequencies of all layers, rounded": (
        YARN,
        lambda tensors: {"model.rotary_emb.inv_freq": frequencies(ml_dtypes.bfloat16)},
    ),
    "positions": (YARN, lambda tensors: {"model.embeddings.position_ids": np.arange(64)[None]}),
    "biases of zero": (YARN, lambda tensors: {"model.layers.0.self_attn.o_proj.bias": np.zeros(32, np.float16)}),
}
DISAGREE = {
    "another head": (TIED, lambda tensors: {HEAD: last_bit(tensors[EMBEDDING])}, "differs from model.embed_tokens"),
    "a head of another shape": (TIED, lambda tensors: {HEAD: tensors[EMBEDDING][:-1]}, "differs from model.embed_tok"),
    "other frequencies": (
        YARN,
        lambda tensors: {"model.rotary_emb.inv_freq": frequencies() * np.float32(1.001)},
        "inv_freq differs from the frequencies that config.json asks for",
    ),
    "frequencies of another head": (
        YARN,
        lambda tensors: {"model.rotary_emb.inv_freq": frequencies()[:-1]},
        "inv_freq differs from the frequencies",
    ),
    "other positions": (
        YARN,
        lambda tensors: {"model.position_ids": np.arange(1, 65)},
        "position_ids differs from the positions 0, 1, ...",
    ),
    "biases": (
        YARN,
        lambda tensors: {"model.layers.0.self_attn.o_proj.bias": np.full(32, 1e-3, np.float16)},
        "1 unknown: model.layers.0.self_attn.o_proj.bias",
    ),
}


@pytest.mark.parametrize("case", AGREE)
def test_tensors_that_agree_are_ignored(tmp_path, case, monkeypatch):
    monkeypatch.setattr(redundant, "_ROWS", 10)  # of 64
    variant, change = AGREE[case]
    opened = checkpoint.open(with_tensors(tmp_path / "more", variant, change))
    architecture, read = opened.architecture, opened.read()
    assert architecture == variant.architecture
    expected = dict(huggingface.flattened(checkpoint.open(write(tmp_path / "model", variant)).read()))
    read = dict(huggingface.flattened(read))
    assert read.keys() == expected.keys()
    for name, x in expected.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x, err_msg=name)


@pytest.mark.parametrize("case", DISAGREE)
def test_tensors_that_disagree_are_refused(tmp_path, case, monkeypatch):
    monkeypatch.setattr(redundant, "_ROWS", 10)
    variant, change, words = DISAGREE[case]
    with pytest.raises(ValueError, match=words) as refused:
        checkpoint.open(with_tensors(tmp_path / "more", variant, change)).read()
    assert "\n" not in str(refused.value)
