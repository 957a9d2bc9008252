"""DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437), and models built like V3: Moonlight, Kimi K2."""

import json
from typing import Any

from moe_jax.checkpoint.families import base
from moe_jax.checkpoint.families.base import Family, field
from moe_jax.checkpoint.names import Rule, decoder_rules, gated_rules
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig

_NEUTRAL = {name: accepted for name, accepted in base.NEUTRAL.items() if name != "moe_layer_freq"}
_NEUTRAL["attention_bias"] = (None, False)
_V2_NEUTRAL = {
    **_NEUTRAL,
    "rope_interleave": (None, True),
    "scoring_func": (None, "softmax"),
    "topk_method": ("greedy", "group_limited_greedy"),
    "norm_topk_prob": (None, False),
}
_V3_NEUTRAL = {
    **_NEUTRAL,
    "rope_interleave": (None, True, False),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
}
_ONLY = {
    "attention.kind": "latent",
    "attention.latent_norm_eps": 1e-6,
    "moe.shared_hidden": 0,
    "moe.shared_gate": False,
}
_V2_ONLY = {
    **_ONLY,
    "attention.rope_interleaved": True,
    "moe.score": "softmax",
    "moe.selection_bias": False,
    "moe.normalize": False,
}
_V3_ONLY = {**_ONLY, "moe.score": "sigmoid", "moe.selection_bias": True, "moe.group_score": "best_two"}


def _dense(fields: dict[str, Any], default: int) -> dict[str, Any]:
    """Reads which layers are dense: those before `first_k_dense_replace`, and those that `moe_layer_freq` excludes.

    `moe_layer_freq` is a number, of which the index of a MoE layer is a multiple, or a list with 1 for each MoE layer.
    This follows the models' own code; transformers does not read it.
    """
    first, freq = field(fields, "first_k_dense_replace", int, default), fields.get("moe_layer_freq")
    is_list = isinstance(freq, list) and len(freq) == base.num_layers(fields)
    if freq is None or (type(freq) is int and freq == 1):
        dense = {"num_dense_layers": first}
    elif is_list and all(type(one) is int and one in (0, 1) for one in freq):
        dense = base.dense_layers(fields, lambda layer: layer < first or not freq[layer])
    elif type(freq) is int and freq > 1:
        dense = base.dense_layers(fields, lambda layer: layer < first or layer % freq != 0)
    else:
        expected = "a whole number from 1 on, or 0 or 1 for each layer"
        raise ValueError(f"moe_layer_freq = {json.dumps(freq)[:100]}: expected {expected}")
    return dense | {"dense_hidden": base.dense_hidden(fields, dense["num_dense_layers"])}


def _dense_json(decoder: DecoderConfig) -> dict[str, Any]:
    """The inverse of `_dense`. `moe_layer_freq` is a list if no number describes the layers."""
    if not decoder.dense_layers:
        return {"first_k_dense_replace": decoder.num_dense_layers, "moe_layer_freq": 1}
    layers = range(decoder.num_layers)
    is_moe = [layer not in decoder.dense_layers for layer in layers]
    first = is_moe.index(True)
    for freq in layers[2:]:
        if is_moe == [layer >= first and layer % freq == 0 for layer in layers]:
            return {"first_k_dense_replace": first, "moe_layer_freq": freq}
    return {"first_k_dense_replace": first, "moe_layer_freq": [int(moe) for moe in is_moe]}


def _attention(fields: dict[str, Any], interleaved: bool) -> AttentionConfig:
    """Reads the attention. `config.json` has no field for the epsilon of the latent norms."""
    num_heads = field(fields, "num_attention_heads", int)
    if (kv_heads := field(fields, "num_key_value_heads", int, num_heads)) != num_heads:
        raise ValueError(f"num_key_value_heads = {kv_heads}: expected num_attention_heads = {num_heads}")
    query_rank = fields.get("q_lora_rank", 1536)  # null means no query rank; absent means the default
    return AttentionConfig(
        kind="latent",
        num_heads=num_heads,
        qk_norm=False,
        query_rank=0 if query_rank is None else field({"q_lora_rank": query_rank}, "q_lora_rank", int),
        latent_rank=field(fields, "kv_lora_rank", int, 512),
        nope_head_dim=field(fields, "qk_nope_head_dim", int, 128),
        rope_head_dim=field(fields, "qk_rope_head_dim", int, 64),
        value_head_dim=field(fields, "v_head_dim", int, 128),
        rope_interleaved=interleaved,
        **base.rope_settings(fields),
    )


def _common_json(architecture: Architecture) -> dict[str, Any]:
    decoder, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    return {
        **base.trunk_json(decoder),
        **_dense_json(decoder),
        "intermediate_size": decoder.dense_hidden,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "attention_bias": False,
        "q_lora_rank": attention.query_rank or None,
        "kv_lora_rank": attention.latent_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        **base.rope_json(attention),
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.k,
        "moe_intermediate_size": moe.expert_hidden,
        "n_shared_experts": moe.num_shared_experts,
        "scoring_func": moe.score,
        "n_group": moe.num_groups,
        "topk_group": moe.num_groups_kept,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.routed_scaling,
    }


def _rules(architecture: Architecture) -> tuple[Rule, ...]:
    mlp = "model.layers.{L}.mlp"
    rules = [Rule("moe/router/weight_LED", f"{mlp}.gate.weight", "E D")]
    if architecture.moe.selection_bias:
        rules.append(Rule("moe/router/bias_LE", f"{mlp}.gate.e_score_correction_bias", "E"))
    rules += gated_rules("moe/experts", f"{mlp}.experts.{{E}}")
    if architecture.moe.num_shared_experts:
        rules += gated_rules("moe/shared", f"{mlp}.shared_experts")
    return decoder_rules(architecture, rules)


def _computed(fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Buffers in some checkpoints (Moonlight) that we compute instead, as `Family.skipped`."""
    layers = range(base.num_layers(fields))
    return tuple((f"model.layers.{layer}.self_attn.rotary_emb.", "frequencies, which are computed") for layer in layers)


def _v2_architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `DeepseekV2Config` in transformers 5; as there, weights are never normalised."""
    base.refuse_others(fields, _V2_NEUTRAL)
    grouped = fields.get("topk_method") == "group_limited_greedy"
    return Architecture(
        base.trunk(fields, norm_eps=1e-6, max_context=2048, **_dense(fields, 0)),
        _attention(fields, interleaved=True),
        MoEConfig(
            num_experts=field(fields, "n_routed_experts", int),
            k=field(fields, "num_experts_per_tok", int),
            expert_hidden=field(fields, "moe_intermediate_size", int),
            num_shared_experts=field(fields, "n_shared_experts", int, 0),
            score="softmax",
            selection_bias=False,
            num_groups=field(fields, "n_group", int) if grouped else 1,
            num_groups_kept=field(fields, "topk_group", int) if grouped else 1,
            group_score="best",
            normalize=False,
            routed_scaling=field(fields, "routed_scaling_factor", float, 1.0),
        ),
    )


def _v2_config_json(architecture: Architecture) -> dict[str, Any]:
    grouped = architecture.moe.num_groups > 1
    base.require_settings("deepseek_v2", architecture, {**_V2_ONLY, **({"moe.group_score": "best"} if grouped else {})})
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **_common_json(architecture),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
    }


def _groups(fields: dict[str, Any], name: str, default: int) -> int:
    """A number of groups; null means 1 (no groups), an absent field the default."""
    return 1 if name in fields and fields[name] is None else field(fields, name, int, default)


def _v3_architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `DeepseekV3Config` in transformers 5."""
    base.refuse_others(fields, _V3_NEUTRAL)
    base.prediction_layers(fields, default=1)
    return Architecture(
        base.trunk(fields, norm_eps=1e-6, max_context=4096, **_dense(fields, 3)),
        _attention(fields, interleaved=field(fields, "rope_interleave", bool, True)),
        MoEConfig(
            num_experts=field(fields, "n_routed_experts", int),
            k=field(fields, "num_experts_per_tok", int),
            expert_hidden=field(fields, "moe_intermediate_size", int),
            num_shared_experts=field(fields, "n_shared_experts", int, 1),
            score="sigmoid",
            selection_bias=True,
            num_groups=_groups(fields, "n_group", 8),
            num_groups_kept=_groups(fields, "topk_group", 4),
            normalize=field(fields, "norm_topk_prob", bool, True),
            routed_scaling=field(fields, "routed_scaling_factor", float, 2.5),
        ),
    )


def _v3_family(model_type: str) -> Family:
    def config_json(architecture: Architecture) -> dict[str, Any]:
        base.require_settings(model_type, architecture, _V3_ONLY)
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": model_type,
            **_common_json(architecture),
            "topk_method": "noaux_tc",
            "rope_interleave": architecture.attention.rope_interleaved,
            "num_nextn_predict_layers": 0,
        }

    return Family(
        model_type=model_type,
        architecture=_v3_architecture,
        config_json=config_json,
        rules=_rules,
        skipped=lambda fields: base.prediction_layers(fields, default=1) + _computed(fields),
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture=_v2_architecture,
    config_json=_v2_config_json,
    rules=_rules,
    skipped=_computed,
)
DEEPSEEK_V3 = _v3_family("deepseek_v3")
KIMI_K2 = _v3_family("kimi_k2")
