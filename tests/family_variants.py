"""Small architectures of every family that cover every branch, and random parameters that all affect the logits."""

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig

TRUNK = DecoderConfig(
    vocab_size=64, d_model=32, num_layers=3, num_dense_layers=0, dense_hidden=40, tie_embeddings=False, max_context=64
)
GROUPED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, rope_fraction=1.0, qk_norm=False)
LATENT = AttentionConfig(
    kind="latent",
    num_heads=4,
    qk_norm=False,
    query_rank=20,
    latent_rank=24,
    nope_head_dim=10,
    rope_head_dim=8,
    value_head_dim=14,
    rope_interleaved=True,
)
SOFTMAX = MoEConfig(
    num_experts=16,
    k=4,
    expert_hidden=12,
    num_shared_experts=0,
    score="softmax",
    selection_bias=False,
    normalize=False,
)
SIGMOID = dataclasses.replace(SOFTMAX, num_shared_experts=1, score="sigmoid", selection_bias=True, normalize=True)
YARN = {"yarn_factor": 8.0, "yarn_original_context": 16, "yarn_beta_fast": 4.0, "rope_theta": 500.0}


class Variant(NamedTuple):
    """An architecture of one family."""

    model_type: str
    architecture: Architecture


def _variant(model_type, attention, moe, trunk=(), attention_changes=(), moe_changes=()):
    return Variant(
        model_type,
        Architecture(
            dataclasses.replace(TRUNK, **dict(trunk)),
            dataclasses.replace(attention, **dict(attention_changes)),
            dataclasses.replace(moe, **dict(moe_changes)),
        ),
    )


_NO_DENSE = {"dense_hidden": DecoderConfig().dense_hidden}  # of families that have no such field
_OLMOE = {"head_dim": 8, "qk_norm": True, "qk_norm_span": "all"}
_QWEN2 = {"num_shared_experts": 1, "shared_gate": True}
_V2 = {"num_shared_experts": 2, "group_score": "best"}
_SCALED = {"routed_scaling": 2.5, "num_shared_experts": 2}
_DENSE = {"num_dense_layers": 1}
_FEWER = {"num_experts": 8, "k": 2}
VARIANTS = {
    "olmoe": _variant("olmoe", GROUPED, SOFTMAX, _NO_DENSE, {**_OLMOE, "num_kv_heads": 4}),
    "olmoe_few_kv_heads": _variant(
        "olmoe", GROUPED, SOFTMAX, {**_NO_DENSE, "tie_embeddings": True}, _OLMOE, {"normalize": True}
    ),
    "olmoe_clipped": _variant(
        "olmoe", GROUPED, SOFTMAX, _NO_DENSE, {**_OLMOE, "num_kv_heads": 4, "clip_qkv": 0.8}, _FEWER
    ),
    "qwen2_moe": _variant("qwen2_moe", GROUPED, SOFTMAX, {}, {"bias": True}, {**_QWEN2, "shared_hidden": 20}),
    "qwen2_moe_dense": _variant("qwen2_moe", GROUPED, SOFTMAX, _DENSE, {}, {**_QWEN2, "normalize": True}),
    "qwen3_moe": _variant("qwen3_moe", GROUPED, SOFTMAX, {}, {"qk_norm": True}, {"normalize": True}),
    "qwen3_moe_yarn": _variant(
        "qwen3_moe", GROUPED, SOFTMAX, {**_DENSE, "tie_embeddings": True, "norm_eps": 1e-3}, {**YARN, "qk_norm": True}
    ),
    "qwen3_moe_middle": _variant(
        "qwen3_moe",
        GROUPED,
        SOFTMAX,
        {"num_dense_layers": 1, "dense_layers": (1,)},
        {"qk_norm": True},
        {**_FEWER, "normalize": True},
    ),
    "qwen2_moe_every_second": _variant(
        "qwen2_moe",
        GROUPED,
        SOFTMAX,
        {"num_layers": 4, "num_dense_layers": 2, "dense_layers": (0, 2)},
        {"bias": True},
        {**_QWEN2, **_FEWER, "shared_hidden": 20},
    ),
    "mixtral": _variant(
        "mixtral", GROUPED, SOFTMAX, _NO_DENSE, {"rope_theta": 1e6}, {"num_experts": 8, "k": 2, "normalize": True}
    ),
    "deepseek_v2": _variant(
        "deepseek_v2",
        LATENT,
        SOFTMAX,
        {**_DENSE, "norm_eps": 1e-3},
        {},
        {**_V2, "num_groups": 4, "num_groups_kept": 2, "routed_scaling": 16.0},
    ),
    "deepseek_v2_lite": _variant(
        "deepseek_v2",
        LATENT,
        SOFTMAX,
        _DENSE,
        {**YARN, "query_rank": 0, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.7},
        _V2,
    ),
    "deepseek_v3": _variant(
        "deepseek_v3",
        LATENT,
        SIGMOID,
        {**_DENSE, "norm_eps": 1e-3},
        {**YARN, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.5},
        {**_SCALED, "num_groups": 4, "num_groups_kept": 2},
    ),
    "deepseek_v3_halves": _variant(
        "deepseek_v3", LATENT, SIGMOID, {"tie_embeddings": True}, {"rope_interleaved": False}, {"normalize": False}
    ),
    "moonlight": _variant("deepseek_v3", LATENT, SIGMOID, {"num_dense_layers": 2}, {"query_rank": 0}, _SCALED),
    "kimi_k2": _variant(
        "kimi_k2",
        LATENT,
        SIGMOID,
        _DENSE,
        {**YARN, "yarn_beta_fast": 1.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 1.0},
        _SCALED,
    ),
    "glm4_moe": _variant(
        "glm4_moe",
        GROUPED,
        SIGMOID,
        _DENSE,
        {"rope_fraction": 0.5, "bias": True},
        {**_SCALED, "num_groups": 4, "num_groups_kept": 2},
    ),
    "glm4_moe_yarn": _variant("glm4_moe", GROUPED, SIGMOID, {}, {**YARN, "rope_fraction": 0.5, "qk_norm": True}),
}
# Variants whose logits by transformers are in tests/golden: every family, and every branch of each.
GOLDEN = (
    *("olmoe", "qwen2_moe", "qwen3_moe_yarn", "mixtral", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3"),
    *("moonlight", "kimi_k2", "glm4_moe"),
    *("olmoe_clipped", "qwen3_moe_middle", "qwen2_moe_every_second"),
)


def random_params(variant: Variant, seed: int = 0):
    """Values that bfloat16 represents exactly, which keep activations near one; norms and biases affect the logits."""
    random = np.random.default_rng(seed)
    flat = {}
    for rule in FAMILIES[variant.model_type].rules(variant.architecture):
        x = random.standard_normal(rule.shape(variant.architecture)).astype(np.float32)
        if "norm" in rule.parameter:
            x = 1 + x / 4
        elif "bias" in rule.parameter:
            x = x / 10
        elif rule.parameter != "embedding_VD":
            x = x * rule.stored_shape(variant.architecture)[-1] ** -0.5
        if "query" in rule.parameter or "key" in rule.parameter:
            x = x * 1.5  # uneven attention, so that its scale and positions matter
        flat[rule.parameter] = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    return huggingface.nested(flat)


def write(folder, variant: Variant, seed: int = 0, dtype: str = "bfloat16"):
    """Writes the variant with random parameters, in the layout of its family."""
    params = random_params(variant, seed)
    huggingface.write_checkpoint(
        folder, variant.architecture, params, dtype=dtype, model_type=variant.model_type, token_ids={"eos_token_id": 1}
    )
    return folder
