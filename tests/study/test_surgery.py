"""Smaller models against the whole one with the removed experts masked: same logits, also after writing and loading."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.config import layer_order
from moe_jax.study import surgery
from tests.family_variants import VARIANTS, Variant, write
from tests.model import plain_loop
from tests.model.test_unlike_layers import ARCHITECTURE, K_L, TOKENS_BT, VARIANT, assert_close

KEPT = [np.array(own) for own in ([0, 2, 3, 7, 9, 11], [1, 2, 4, 5, 6, 10], [0, 1, 2], [0, 3, 4, 8], [0, 2])]
TOKENS = np.random.default_rng(5).integers(2, 64, (4, 20), dtype=np.int32)


def write_pruned(folder, path, kept):
    """As launch/prune.py does."""
    whole = checkpoint.open(folder)
    params = surgery.without_others(whole.read(), whole.architecture, kept)
    architecture = surgery.architecture_of(whole.architecture, kept)
    whole.for_new_weights().with_architecture(architecture).save(path, params)
    return params, architecture


def masked_plain(tensors, kept):
    """The plain loop over the whole model, with the logits of removed experts at -inf."""
    masks = [np.isin(np.arange(len(tensors[name])), own) for name, own in zip(gates(tensors), kept, strict=True)]
    tensors = {name: jnp.asarray(one) for name, one in tensors.items()}
    with jax.numpy_rank_promotion("allow"):
        one = lambda tokens_T: plain_loop.logits(tensors, tokens_T, ARCHITECTURE, K_L, masks)  # noqa: E731
        return jax.vmap(one)(TOKENS_BT)


def gates(tensors):
    named = [name for name in tensors if name.endswith("mlp.gate.weight")]
    return sorted(named, key=lambda name: int(name.split(".")[2]))


def test_layers_of_different_sizes(tmp_path):
    """From layers that differ already, to others: stacks are regrouped, and each layer keeps its own k."""
    whole = write(tmp_path / "whole", VARIANT, dtype="float32")
    _, architecture = write_pruned(whole, tmp_path / "pruned", KEPT)
    assert architecture.num_experts_L == (6, 6, 3, 4, 2) and architecture.k_L == K_L
    assert {*layer_order.stacks(architecture)} == {"dense", "moe", "moe_4", "moe_3", "moe_2"}
    fields = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert fields["num_experts"] == 6 and fields["num_experts_of_layers"] == [6, 6, 3, 4, 2]
    model = moe_jax.load(tmp_path / "pruned", dtype="float32")
    assert model.architecture == architecture
    expected = masked_plain(safetensors.numpy.load_file(whole / "model.safetensors"), KEPT)
    assert_close(model.logits(TOKENS_BT), expected)
    with pytest.raises(AssertionError):
        assert_close(model.logits(TOKENS_BT), masked_plain_of_others(whole))
    with pytest.raises(ValueError, match=r"expected 1 to 4 experts in every layer; more need"):
        model.logits(TOKENS_BT, policy="topk:7")
    with pytest.raises(ValueError, match=r"policy.k_max = 7: expected 0 .* to 6 experts"):
        model.logits(TOKENS_BT, policy="topk:7", k_max=7)


def masked_plain_of_others(whole):
    others = [*KEPT[:2], KEPT[2], np.array([1, 3, 4, 8]), KEPT[4]]
    return masked_plain(safetensors.numpy.load_file(whole / "model.safetensors"), others)


def test_layers_that_become_alike_have_no_numbers_of_their_own(tmp_path):
    kept = [np.arange(4, 7), np.arange(3), np.arange(3), np.arange(6, 9), np.arange(3)]
    with pytest.raises(ValueError, match=r"moe.k = 4: expected at most moe.num_experts = 3"):
        surgery.architecture_of(ARCHITECTURE, kept)
    few = Variant("qwen3_moe", with_k(2))
    whole = write(tmp_path / "few", few, dtype="float32")
    write_pruned(whole, tmp_path / "pruned", kept)
    fields = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert fields["num_experts"] == 3 and "num_experts_of_layers" not in fields


def with_k(k):
    return dataclasses.replace(ARCHITECTURE, moe=dataclasses.replace(ARCHITECTURE.moe, k=k, k_of_layers=()))


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "moonlight"])
def test_groups_bias_shared_and_dense_layers(name, tmp_path):
    """The whole model with a selection bias of -1e9 on removed experts: none of them is chosen."""
    variant = VARIANTS[name]
    whole = write(tmp_path / "whole", variant)
    moe, layers = variant.architecture.moe, variant.architecture.decoder.num_moe_layers
    by_group = np.arange(moe.num_experts).reshape(moe.num_groups, -1)
    random = np.random.default_rng(6)
    keep = by_group.shape[1] // 2
    kept = [np.sort(np.concatenate([random.choice(own, keep, False) for own in by_group])) for _ in range(layers)]
    params, architecture = write_pruned(whole, tmp_path / "pruned", kept)
    assert architecture.moe.num_experts == moe.num_experts // 2 and architecture.moe.k == moe.k
    opened = checkpoint.open(whole)
    masked = opened.read("float32")
    for bias_E, own in zip(masked["moe"]["router"]["bias_LE"], kept):
        bias_E[np.setdiff1d(np.arange(moe.num_experts), own)] = -1e9
    expected = moe_jax.Model(opened, jax.device_put(masked)).logits(TOKENS)
    assert_close(moe_jax.load(tmp_path / "pruned", dtype="float32").logits(TOKENS), expected)
    stored = dict(huggingface.flattened(checkpoint.open(tmp_path / "pruned").read()))
    for path, value in huggingface.flattened(params):
        np.testing.assert_array_equal(stored[path], value, err_msg=path)
