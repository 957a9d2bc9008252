"""OLMoE (arXiv 2409.02060): queries and keys normed over all heads, a softmax router, no shared experts."""

import math
from typing import Any

from moe_jax.checkpoint.families import base
from moe_jax.checkpoint.families.base import Family, field
from moe_jax.checkpoint.names import Rule, decoder_rules, gated_rules
from moe_jax.config.architecture import Architecture, AttentionConfig, MoEConfig

_MODEL_TYPE = "olmoe"
_NEUTRAL = {name: accepted for name, accepted in base.NEUTRAL.items() if name != "clip_qkv"}
_NEUTRAL["attention_bias"] = (None, False)
_ONLY = {
    **base.PLAIN_SETTINGS,
    **base.NO_SHARED_EXPERTS,
    "decoder.num_dense_layers": 0,
    "attention.qk_norm": True,
    "attention.qk_norm_span": "all",
    "attention.bias": False,
}


def _architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `OlmoeConfig` in transformers 5."""
    base.refuse_others(fields, _NEUTRAL)
    heads = base.grouped_heads(fields)
    _require_full_heads(field(fields, "hidden_size", int), heads["num_heads"], heads["head_dim"])
    return Architecture(
        base.trunk(fields, norm_eps=1e-5, max_context=4096, num_dense_layers=0),
        AttentionConfig(
            **heads,
            **base.rope_settings(fields),
            rope_fraction=1.0,
            qk_norm=True,
            qk_norm_span="all",
            clip_qkv=_bound(fields),
        ),
        MoEConfig(
            num_experts=field(fields, "num_experts", int, 64),
            k=field(fields, "num_experts_per_tok", int, 8),
            expert_hidden=field(fields, "intermediate_size", int),
            num_shared_experts=0,
            score="softmax",
            selection_bias=False,
            normalize=field(fields, "norm_topk_prob", bool, False),
        ),
    )


def _bound(fields: dict[str, Any]) -> float:
    """The bound to which queries, keys and values are clipped; 0: they are not."""
    bound = field(fields, "clip_qkv", float, None)
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"clip_qkv = {bound}: expected a positive number, or null")
    return bound or 0.0


def _require_full_heads(d_model: int, num_heads: int, head_dim: int) -> None:
    if num_heads * head_dim != d_model:
        raise ValueError(f"head_dim = {head_dim}: expected hidden_size / num_attention_heads = {d_model} / {num_heads}")


def _config_json(architecture: Architecture) -> dict[str, Any]:
    base.require_settings(_MODEL_TYPE, architecture, _ONLY)
    decoder, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    _require_full_heads(decoder.d_model, attention.num_heads, attention.head_dim)
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": _MODEL_TYPE,
        **base.trunk_json(decoder),
        **base.grouped_heads_json(attention),
        "attention_bias": False,
        "clip_qkv": attention.clip_qkv or None,
        **base.rope_json(attention),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.k,
        "intermediate_size": moe.expert_hidden,
        "norm_topk_prob": moe.normalize,
    }


def _rules(architecture: Architecture) -> tuple[Rule, ...]:
    mlp = "model.layers.{L}.mlp"
    router = Rule("moe/router/weight_LED", f"{mlp}.gate.weight", "E D")
    return decoder_rules(architecture, [router, *gated_rules("moe/experts", f"{mlp}.experts.{{E}}")])


OLMOE = Family(
    model_type=_MODEL_TYPE,
    architecture=_architecture,
    config_json=_config_json,
    rules=_rules,
    skipped=base.nothing_skipped,
)
