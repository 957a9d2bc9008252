"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671) with a gated shared expert, Qwen3-MoE (arXiv 2505.09388) without."""

import json
from typing import Any

from moe_jax.checkpoint.families import base
from moe_jax.checkpoint.families.base import Family, field
from moe_jax.checkpoint.names import Rule, decoder_rules, gated_rules
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig

# Published files have sliding_window together with use_sliding_window = false, so that it has no effect.
_NEUTRAL = {name: accepted for name, accepted in base.NEUTRAL.items() if name != "sliding_window"}
_QWEN2_ONLY = {
    **base.PLAIN_SETTINGS,
    "attention.qk_norm": False,
    "attention.clip_qkv": 0.0,
    "moe.num_shared_experts": 1,
    "moe.shared_gate": True,
}
_QWEN3_NEUTRAL = {**_NEUTRAL, "attention_bias": (None, False)}
_QWEN3_ONLY = {
    **base.PLAIN_SETTINGS,
    **base.NO_SHARED_EXPERTS,
    "attention.qk_norm": True,
    "attention.qk_norm_span": "head",
    "attention.bias": False,
    "attention.clip_qkv": 0.0,
}


def _trunk(fields: dict[str, Any]) -> DecoderConfig:
    """A layer is dense if `mlp_only_layers` lists it or its number + 1 is not a multiple of `decoder_sparse_step`."""
    listed, step = field(fields, "mlp_only_layers", list, []), field(fields, "decoder_sparse_step", int, 1)
    if not all(type(layer) is int for layer in listed):
        raise ValueError(f"mlp_only_layers = {json.dumps(listed)[:100]}: expected a list of layer numbers, from 0")
    if step < 1:
        raise ValueError(f"decoder_sparse_step = {step}: expected 1 or more")
    dense = base.dense_layers(fields, lambda layer: layer in listed or (layer + 1) % step != 0)
    dense_hidden = base.dense_hidden(fields, dense["num_dense_layers"])
    return base.trunk(fields, norm_eps=1e-6, max_context=32768, **dense, dense_hidden=dense_hidden)


def _routed(fields: dict[str, Any], **shared: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=field(fields, "num_experts", int, older="num_local_experts"),
        k=field(fields, "num_experts_per_tok", int),
        expert_hidden=field(fields, "moe_intermediate_size", int),
        score="softmax",
        selection_bias=False,
        normalize=field(fields, "norm_topk_prob", bool, False),
        **shared,
    )


def _shared_json(architecture: Architecture) -> dict[str, Any]:
    decoder, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    return {
        **base.trunk_json(decoder),
        "intermediate_size": decoder.dense_hidden,
        "mlp_only_layers": list(decoder.dense_layers or range(decoder.num_dense_layers)),
        "decoder_sparse_step": 1,
        **base.grouped_heads_json(attention),
        "use_sliding_window": False,
        **base.rope_json(attention),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.k,
        "moe_intermediate_size": moe.expert_hidden,
        "norm_topk_prob": moe.normalize,
    }


def _rules(architecture: Architecture) -> tuple[Rule, ...]:
    mlp = "model.layers.{L}.mlp"
    rules = [Rule("moe/router/weight_LED", f"{mlp}.gate.weight", "E D")]
    rules += gated_rules("moe/experts", f"{mlp}.experts.{{E}}")
    if architecture.moe.num_shared_experts:
        rules += gated_rules("moe/shared", f"{mlp}.shared_expert")
        rules.append(Rule("moe/shared_gate_LD", f"{mlp}.shared_expert_gate.weight", "1 D"))
    return decoder_rules(architecture, rules)


def _qwen2_architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `Qwen2MoeConfig` in transformers 5."""
    base.refuse_others(fields, _NEUTRAL)
    width = field(fields, "shared_expert_intermediate_size", int)
    if width < 1:
        raise ValueError(f"shared_expert_intermediate_size = {width}: expected a positive number")
    same = width == field(fields, "moe_intermediate_size", int)
    return Architecture(
        _trunk(fields),
        AttentionConfig(
            **base.grouped_heads(fields, kv_heads=16),
            **base.rope_settings(fields),
            rope_fraction=1.0,
            qk_norm=False,
            bias=field(fields, "qkv_bias", bool, True),
        ),
        _routed(fields, num_shared_experts=1, shared_hidden=0 if same else width, shared_gate=True),
    )


def _qwen2_config_json(architecture: Architecture) -> dict[str, Any]:
    base.require_settings("qwen2_moe", architecture, _QWEN2_ONLY)
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **_shared_json(architecture),
        "qkv_bias": architecture.attention.bias,
        "shared_expert_intermediate_size": architecture.moe.shared_width,
    }


def _qwen3_architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `Qwen3MoeConfig` in transformers 5."""
    base.refuse_others(fields, _QWEN3_NEUTRAL)
    return Architecture(
        _trunk(fields),
        AttentionConfig(
            **base.grouped_heads(fields, kv_heads=4),
            **base.rope_settings(fields),
            rope_fraction=1.0,
            qk_norm=True,
        ),
        _routed(fields, num_shared_experts=0),
    )


def _qwen3_config_json(architecture: Architecture) -> dict[str, Any]:
    base.require_settings("qwen3_moe", architecture, _QWEN3_ONLY)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_shared_json(architecture),
        "attention_bias": False,
    }


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture=_qwen2_architecture,
    config_json=_qwen2_config_json,
    rules=_rules,
    skipped=base.nothing_skipped,
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture=_qwen3_architecture,
    config_json=_qwen3_config_json,
    rules=_rules,
    skipped=base.nothing_skipped,
)
