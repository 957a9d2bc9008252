"""A tiny checkpoint of GLM's family in Hugging Face layout, and functions that change one."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig

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


def random_params(architecture, dtype):
    """Normal random numbers by path, the router's bias in float32."""
    random = np.random.default_rng(0)
    return {
        rule.parameter: random.standard_normal(rule.shape(architecture)).astype(np.float32 if rule.float32 else dtype)
        for rule in FAMILIES["glm4_moe"].rules(architecture)
    }


def flattened(params):
    """Path -> array."""
    return dict(huggingface.flattened(params))


def edit_config(folder, **fields):
    """Adds fields to config.json, or replaces them."""
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
    """The error message with which `folder` is refused."""
    with pytest.raises(ValueError) as caught:
        checkpoint.open(folder).read(**options)
    message = str(caught.value)
    assert "\n" not in message
    return message
