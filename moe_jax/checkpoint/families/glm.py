"""GLM-4.5 (arXiv 2508.06471): grouped-query attention with partial rotary embedding, and DeepSeek-V3's router."""

from typing import Any

from moe_jax.checkpoint.families import base
from moe_jax.checkpoint.families.base import Family, field
from moe_jax.checkpoint.names import Rule, decoder_rules, gated_rules
from moe_jax.config.architecture import Architecture, AttentionConfig, MoEConfig

_MODEL_TYPE = "glm4_moe"
_NEUTRAL = {**base.NEUTRAL, "scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")}
_ONLY = {
    "decoder.dense_layers": (),
    "attention.kind": "grouped",
    "attention.clip_qkv": 0.0,
    "attention.qk_norm_span": "head",
    "attention.rope_interleaved": False,
    "moe.score": "sigmoid",
    "moe.selection_bias": True,
    "moe.group_score": "best_two",
    "moe.shared_hidden": 0,
    "moe.shared_gate": False,
}


def _architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `Glm4MoeConfig` in transformers 5."""
    base.refuse_others(fields, _NEUTRAL)
    base.prediction_layers(fields, default=1)
    dense = {
        "num_dense_layers": field(fields, "first_k_dense_replace", int, 1),
        "dense_hidden": field(fields, "intermediate_size", int),
    }
    return Architecture(
        base.trunk(fields, norm_eps=1e-5, max_context=131072, **dense),
        AttentionConfig(
            **base.grouped_heads(fields),
            **base.rope_settings(fields, fraction=0.5),
            qk_norm=field(fields, "use_qk_norm", bool, False),
            bias=field(fields, "attention_bias", bool, False),
        ),
        MoEConfig(
            num_experts=field(fields, "n_routed_experts", int),
            k=field(fields, "num_experts_per_tok", int),
            expert_hidden=field(fields, "moe_intermediate_size", int),
            num_shared_experts=field(fields, "n_shared_experts", int, 1),
            score="sigmoid",
            selection_bias=True,
            num_groups=field(fields, "n_group", int, 1),
            num_groups_kept=field(fields, "topk_group", int, 1),
            normalize=field(fields, "norm_topk_prob", bool, True),
            routed_scaling=field(fields, "routed_scaling_factor", float, 1.0),
        ),
    )


def _config_json(architecture: Architecture) -> dict[str, Any]:
    base.require_settings(_MODEL_TYPE, architecture, _ONLY)
    decoder, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": _MODEL_TYPE,
        **base.trunk_json(decoder),
        "first_k_dense_replace": decoder.num_dense_layers,
        "intermediate_size": decoder.dense_hidden,
        **base.grouped_heads_json(attention),
        "use_qk_norm": attention.qk_norm,
        "attention_bias": attention.bias,
        **base.rope_json(attention, with_fraction=True),
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.k,
        "moe_intermediate_size": moe.expert_hidden,
        "n_shared_experts": moe.num_shared_experts,
        "n_group": moe.num_groups,
        "topk_group": moe.num_groups_kept,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.routed_scaling,
        "num_nextn_predict_layers": 0,
    }


def _rules(architecture: Architecture) -> tuple[Rule, ...]:
    mlp = "model.layers.{L}.mlp"
    rules = [
        Rule("moe/router/weight_LED", f"{mlp}.gate.weight", "E D"),
        Rule("moe/router/bias_LE", f"{mlp}.gate.e_score_correction_bias", "E"),
        *gated_rules("moe/experts", f"{mlp}.experts.{{E}}"),
    ]
    if architecture.moe.num_shared_experts:
        rules += gated_rules("moe/shared", f"{mlp}.shared_experts")
    return decoder_rules(architecture, rules)


GLM4_MOE = Family(
    model_type=_MODEL_TYPE,
    architecture=_architecture,
    config_json=_config_json,
    rules=_rules,
    skipped=lambda fields: base.prediction_layers(fields, default=1),
)
