"""The model families that can be read and written: `config.json` to and from `Architecture`, and names of tensors.

A family is one row of `FAMILIES`; what reads and writes checkpoints knows only `Family` and `names.Rule`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from moe_jax.checkpoint.names import Rule, attention_rules, gated_rules, trunk_rules
from moe_jax.config.schema import Architecture, AttentionConfig, DecoderConfig, MoEConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One published model family.

    Attributes:
        model_type: what `config.json` calls it.
        architecture: the shape that a `config.json` describes; ValueError names a field that asks for what we lack.
        config_json: the inverse, without token ids and dtype; ValueError names a setting that the family lacks.
        rules: the parameters of an architecture and their tensors.
        skipped: (prefix of tensor names, what they are) that such a checkpoint may hold and that we do not run.
    """

    model_type: str
    architecture: Callable[[dict[str, Any]], Architecture]
    config_json: Callable[[Architecture], dict[str, Any]]
    rules: Callable[[Architecture], tuple[Rule, ...]]
    skipped: Callable[[dict[str, Any]], tuple[tuple[str, str], ...]]


def family_of(fields: dict[str, Any]) -> Family:
    """Finds the family that a `config.json` names; ValueError lists the supported ones."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type = {json.dumps(model_type)}: supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


# Fields that change the computation, with the values that leave it as the decoder runs it.
_NEUTRAL: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "mlp_bias": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "rope_interleave": (None, False),
    "moe_layer_freq": (None, 1),
}


def _refuse_others(fields: dict[str, Any], neutral: dict[str, tuple]) -> None:
    for field, accepted in neutral.items():
        value = fields.get(field, accepted[0])
        if field == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if value not in accepted:
            wanted = " or ".join(map(json.dumps, accepted))
            raise ValueError(f"{field} = {json.dumps(value)}: wanted {wanted}; nothing else is implemented")


_REQUIRED = object()


def _field(fields: dict[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Reads one field; null counts as absent, and an integer as a float."""
    value = fields.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{name} is missing: wanted {kind.__name__}")
        return default
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} = {json.dumps(value)}: wanted {kind.__name__}")
    return value


def _rope(fields: dict[str, Any], default_fraction: float) -> tuple[float, float]:
    """Returns theta and the rotated fraction; `rope_parameters`, once `rope_scaling`, wins over top-level fields."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    inner = _field(fields, name, dict, {})
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind != "default":
        raise ValueError(f'{name}.rope_type = {json.dumps(kind)}: wanted "default"; nothing else is implemented')
    if others := sorted(set(inner) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        raise ValueError(f"{name}.{others[0]} = {json.dumps(inner[others[0]])}: not implemented")
    both = {**fields, **{key: value for key, value in inner.items() if value is not None}}
    return _field(both, "rope_theta", float, 10000.0), _field(both, "partial_rotary_factor", float, default_fraction)


_MOST_PREDICTION_LAYERS = 100  # published models have one
_GLM4_MOE_NEUTRAL = {**_NEUTRAL, "scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")}


def _glm4_moe_architecture(fields: dict[str, Any]) -> Architecture:
    """Defaults are those of `Glm4MoeConfig` in transformers 5."""
    _refuse_others(fields, _GLM4_MOE_NEUTRAL)
    if not 0 <= (count := _field(fields, "num_nextn_predict_layers", int, 1)) <= _MOST_PREDICTION_LAYERS:
        raise ValueError(f"num_nextn_predict_layers = {count}: wanted 0 to {_MOST_PREDICTION_LAYERS}")
    d_model, num_heads = _field(fields, "hidden_size", int), _field(fields, "num_attention_heads", int)
    theta, fraction = _rope(fields, default_fraction=0.5)
    return Architecture(
        DecoderConfig(
            vocab_size=_field(fields, "vocab_size", int),
            d_model=d_model,
            num_layers=_field(fields, "num_hidden_layers", int),
            num_dense_layers=_field(fields, "first_k_dense_replace", int, 1),
            dense_hidden=_field(fields, "intermediate_size", int),
            norm_eps=_field(fields, "rms_norm_eps", float, 1e-5),
            tie_embeddings=_field(fields, "tie_word_embeddings", bool, False),
            max_context=_field(fields, "max_position_embeddings", int, 131072),
        ),
        AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=_field(fields, "num_key_value_heads", int),
            head_dim=_field(fields, "head_dim", int, d_model // max(num_heads, 1)),
            qk_norm=_field(fields, "use_qk_norm", bool, False),
            bias=_field(fields, "attention_bias", bool, False),
            rope_theta=theta,
            rope_fraction=fraction,
        ),
        MoEConfig(
            num_experts=_field(fields, "n_routed_experts", int),
            k=_field(fields, "num_experts_per_tok", int),
            expert_hidden=_field(fields, "moe_intermediate_size", int),
            num_shared_experts=_field(fields, "n_shared_experts", int, 1),
            score="sigmoid",
            selection_bias=True,
            num_groups=_field(fields, "n_group", int, 1),
            num_groups_kept=_field(fields, "topk_group", int, 1),
            normalize=_field(fields, "norm_topk_prob", bool, True),
            routed_scaling=_field(fields, "routed_scaling_factor", float, 1.0),
        ),
    )


def _glm4_moe_config_json(architecture: Architecture) -> dict[str, Any]:
    decoder, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    for setting, given, wanted in (("score", moe.score, "sigmoid"), ("selection_bias", moe.selection_bias, True)):
        if given != wanted:
            raise ValueError(f"moe.{setting} = {given!r}: the Hugging Face family glm4_moe only has {wanted!r}")
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.d_model,
        "num_hidden_layers": decoder.num_layers,
        "first_k_dense_replace": decoder.num_dense_layers,
        "intermediate_size": decoder.dense_hidden,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tie_embeddings,
        "max_position_embeddings": decoder.max_context,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "use_qk_norm": attention.qk_norm,
        "attention_bias": attention.bias,
        # Twice: transformers 5 reads rope_parameters, older readers the two fields behind it.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": attention.rope_fraction,
        },
        "rope_theta": attention.rope_theta,
        "partial_rotary_factor": attention.rope_fraction,
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


def _glm4_moe_rules(architecture: Architecture) -> tuple[Rule, ...]:
    rules = trunk_rules(architecture.decoder)
    mlp = "model.layers.{L}.mlp"
    if architecture.decoder.num_dense_layers:
        rules += attention_rules("dense", architecture.attention) + gated_rules("dense/ffn", mlp)
    rules += attention_rules("moe", architecture.attention)
    rules.append(Rule("moe/router/weight_LED", f"{mlp}.gate.weight", "E D"))
    rules.append(Rule("moe/router/bias_LE", f"{mlp}.gate.e_score_correction_bias", "E", float32=True))
    rules += gated_rules("moe/experts", f"{mlp}.experts.{{E}}")
    if architecture.moe.num_shared_experts:
        rules += gated_rules("moe/shared", f"{mlp}.shared_experts")
    return tuple(rules)


def _glm4_moe_skipped(fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Multi-token prediction layers, which published checkpoints hold behind the decoder's own."""
    first, count = fields["num_hidden_layers"], _field(fields, "num_nextn_predict_layers", int, 1)
    return tuple((f"model.layers.{layer}.", "a multi-token prediction layer") for layer in range(first, first + count))


FAMILIES: dict[str, Family] = {
    "glm4_moe": Family(
        model_type="glm4_moe",
        architecture=_glm4_moe_architecture,
        config_json=_glm4_moe_config_json,
        rules=_glm4_moe_rules,
        skipped=_glm4_moe_skipped,
    ),
}
