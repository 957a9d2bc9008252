"""Mixtral (arXiv 2401.04088): few large experts, weighted by a softmax over the chosen ones."""

from typing import Any

from moe_jax.checkpoint.families import base
from moe_jax.checkpoint.families.base import Family, field
from moe_jax.checkpoint.names import Rule, decoder_rules, gated_rules
from moe_jax.config.architecture import Architecture, AttentionConfig, MoEConfig

_MODEL_TYPE = "mixtral"
_NEUTRAL = {**base.NEUTRAL, "attention_bias": (None, False)}
_ONLY = {
    **base.PLAIN_SETTINGS,
    **base.NO_SHARED_EXPERTS,
    "decoder.num_dense_layers": 0,
    "attention.qk_norm": False,
    "attention.bias": False,
    "attention.clip_qkv": 0.0,
    "moe.normalize": True,
}


def _architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `MixtralConfig` in transformers 5."""
    base.refuse_others(fields, _NEUTRAL)
    return Architecture(
        base.trunk(fields, norm_eps=1e-5, max_context=131072, num_dense_layers=0),
        AttentionConfig(
            **base.grouped_heads(fields, kv_heads=8),
            **base.rope_settings(fields, theta=1e6),
            rope_fraction=1.0,
            qk_norm=False,
        ),
        MoEConfig(
            num_experts=field(fields, "num_local_experts", int, 8),
            k=field(fields, "num_experts_per_tok", int, 2),
            expert_hidden=field(fields, "intermediate_size", int),
            num_shared_experts=0,
            score="softmax",
            selection_bias=False,
            normalize=True,
        ),
    )


def _config_json(architecture: Architecture) -> dict[str, Any]:
    base.require_settings(_MODEL_TYPE, architecture, _ONLY)
    moe = architecture.moe
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": _MODEL_TYPE,
        **base.trunk_json(architecture.decoder),
        **base.grouped_heads_json(architecture.attention),
        "sliding_window": None,
        **base.rope_json(architecture.attention),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.k,
        "intermediate_size": moe.expert_hidden,
    }


def _rules(architecture: Architecture) -> tuple[Rule, ...]:
    block = "model.layers.{L}.block_sparse_moe"
    router = Rule("moe/router/weight_LED", f"{block}.gate.weight", "E D")
    experts = gated_rules("moe/experts", f"{block}.experts.{{E}}", halves=("w1", "w3"), down="w2")
    return decoder_rules(architecture, [router, *experts])


MIXTRAL = Family(
    model_type=_MODEL_TYPE,
    architecture=_architecture,
    config_json=_config_json,
    rules=_rules,
    skipped=base.nothing_skipped,
)
