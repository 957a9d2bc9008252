"""What all model families share: reading fields of `config.json`, refusing unsupported ones, and common settings."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from moe_jax.checkpoint.names import Rule
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig
from moe_jax.model import rope


@dataclasses.dataclass(frozen=True)
class Family:
    """One published model family.

    Attributes:
        model_type: its name in `config.json`.
        architecture: reads the fields of `config.json`; ValueError names a field that asks for something unsupported.
        config_json: the inverse, without token ids and dtype; ValueError names a setting that the family lacks.
        rules: the parameters of an architecture and their tensors.
        skipped: (prefix of tensor names, what they are) of tensors that a checkpoint may hold and that are not used.
    """

    model_type: str
    architecture: Callable[[dict[str, Any]], Architecture]
    config_json: Callable[[Architecture], dict[str, Any]]
    rules: Callable[[Architecture], tuple[Rule, ...]]
    skipped: Callable[[dict[str, Any]], tuple[tuple[str, str], ...]]


# Fields that change the computation, with the values that the decoder implements. The first is the value of a field
# that is absent.
NEUTRAL: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "mlp_bias": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_sinks": (None, False),
    "rope_interleave": (None, False),
    "moe_layer_freq": (None, 1),
}


def refuse_others(fields: dict[str, Any], neutral: dict[str, tuple]) -> None:
    """Raises ValueError if a field has a value that is not listed for it."""
    for name, accepted in neutral.items():
        value = fields.get(name, accepted[0])
        if name == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if name == "moe_layer_freq" and isinstance(value, list) and value == _prefix_then_moe(fields):
            continue
        if value not in accepted or type(value) not in map(type, accepted):
            expected = " or ".join(map(json.dumps, accepted))
            raise ValueError(f"{name} = {json.dumps(value)}: expected {expected}; nothing else is implemented")


def _prefix_then_moe(fields: dict[str, Any]) -> list[int]:
    """The list for a dense prefix followed by MoE layers: 0 for each dense layer, 1 for each MoE layer."""
    count, dense = fields.get("num_hidden_layers"), fields.get("first_k_dense_replace") or 0
    return [int(layer >= dense) for layer in range(count)] if isinstance(count, int) else []


def require_settings(model_type: str, architecture: Architecture, only: dict[str, Any]) -> None:
    """Raises ValueError if a setting (`section.field`) differs from the only value that a family supports."""
    for setting, expected in only.items():
        section, name = setting.split(".")
        given = getattr(getattr(architecture, section), name)
        if given != expected:
            raise ValueError(f"{setting} = {given!r}: the Hugging Face family {model_type} only has {expected!r}")


_MOST_LISTED_LAYERS = 10_000  # more than any model has; limits the lists made from config.json


def dense_layers(fields: dict[str, Any], is_dense: Callable[[int], bool]) -> dict[str, Any]:
    """`num_dense_layers` and `dense_layers` of a model; `is_dense` takes the number of a layer, from 0."""
    count = field(fields, "num_hidden_layers", int)
    if count > _MOST_LISTED_LAYERS:
        raise ValueError(f"num_hidden_layers = {count}: expected at most {_MOST_LISTED_LAYERS}")
    places = tuple(filter(is_dense, range(count)))
    return {"num_dense_layers": len(places), "dense_layers": () if places == tuple(range(len(places))) else places}


# Fields for MoE layers that differ: one number for each MoE layer, in order. They are our own: published families have
# one number for all layers, which then gives the largest.
_OF_LAYERS = {"num_experts_of_layers": "num_experts_of_layers", "num_experts_per_tok_of_layers": "k_of_layers"}
OF_LAYERS = tuple(_OF_LAYERS)


def with_numbers_of_layers(architecture: Architecture, fields: dict[str, Any]) -> Architecture:
    """The architecture with the numbers that `config.json` gives for single layers; ValueError if they do not fit."""
    given = {setting: fields[name] for name, setting in _OF_LAYERS.items() if fields.get(name) is not None}
    for name, setting in _OF_LAYERS.items():
        numbers = given.get(setting, [])
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"{name} = {json.dumps(numbers)[:100]}: expected a list of integers")
    moe = dataclasses.replace(architecture.moe, **{setting: tuple(numbers) for setting, numbers in given.items()})
    return dataclasses.replace(architecture, moe=moe)


def numbers_of_layers_json(architecture: Architecture) -> dict[str, list[int]]:
    """The inverse of `with_numbers_of_layers`."""
    found = {name: list(getattr(architecture.moe, setting)) for name, setting in _OF_LAYERS.items()}
    return {name: numbers for name, numbers in found.items() if numbers}


# The settings of families without latents, selection bias, expert groups and scaling.
PLAIN_SETTINGS = {
    "attention.kind": "grouped",
    "attention.rope_interleaved": False,
    "attention.rope_fraction": 1.0,
    "moe.score": "softmax",
    "moe.selection_bias": False,
    "moe.num_groups": 1,
    "moe.num_groups_kept": 1,
    "moe.routed_scaling": 1.0,
}
NO_SHARED_EXPERTS = {"moe.num_shared_experts": 0}

_REQUIRED = object()


def field(fields: dict[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Reads one field; null counts as absent, and an integer as a float."""
    value = fields.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{name} is missing: expected {kind.__name__}")
        return default
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} = {json.dumps(value)}: expected {kind.__name__}")
    return value


def trunk(fields: dict[str, Any], *, norm_eps: float, max_context: int, **dense: Any) -> DecoderConfig:
    """The decoder settings that all families share.

    Args:
        fields: of `config.json`.
        norm_eps: default of the family.
        max_context: default of the family.
        **dense: `num_dense_layers`, `dense_layers` and `dense_hidden`.
    """
    return DecoderConfig(
        vocab_size=field(fields, "vocab_size", int),
        d_model=field(fields, "hidden_size", int),
        num_layers=field(fields, "num_hidden_layers", int),
        norm_eps=field(fields, "rms_norm_eps", float, norm_eps),
        tie_embeddings=field(fields, "tie_word_embeddings", bool, False),
        max_context=field(fields, "max_position_embeddings", int, max_context),
        **dense,
    )


def trunk_json(decoder: DecoderConfig) -> dict[str, Any]:
    """The inverse of `trunk`, without dense layers."""
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.d_model,
        "num_hidden_layers": decoder.num_layers,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tie_embeddings,
        "max_position_embeddings": decoder.max_context,
    }


def grouped_heads(fields: dict[str, Any], kv_heads: int | None = None) -> dict[str, int]:
    """`num_heads`, `num_kv_heads` and `head_dim`.

    Args:
        fields: of `config.json`.
        kv_heads: default of the family; None: as many as heads.
    """
    num_heads = field(fields, "num_attention_heads", int)
    return {
        "num_heads": num_heads,
        "num_kv_heads": field(fields, "num_key_value_heads", int, num_heads if kv_heads is None else kv_heads),
        "head_dim": field(fields, "head_dim", int, field(fields, "hidden_size", int) // max(num_heads, 1)),
    }


def grouped_heads_json(attention: AttentionConfig) -> dict[str, int]:
    """The inverse of `grouped_heads`."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    }


# Fields of YaRN, our settings, their types, and defaults of those that may be absent.
_YARN = (
    ("factor", "yarn_factor", float, _REQUIRED),
    ("original_max_position_embeddings", "yarn_original_context", int, _REQUIRED),
    ("beta_fast", "yarn_beta_fast", float, 32.0),
    ("beta_slow", "yarn_beta_slow", float, 1.0),
    ("mscale", "yarn_mscale", float, 0.0),
    ("mscale_all_dim", "yarn_mscale_all_dim", float, 0.0),
)


def rope_settings(
    fields: dict[str, Any], theta: float = 10000.0, fraction: float | None = None
) -> dict[str, float | int]:
    """`rope_theta` and the YaRN settings; also `rope_fraction` if `fraction` is given.

    `rope_parameters`, or the older `rope_scaling`, takes precedence over top-level fields.

    Args:
        fields: of `config.json`.
        theta: default of the family.
        fraction: default of the family; None: it rotates all channels.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    inner = {key: value for key, value in field(fields, name, dict, {}).items() if value is not None}
    if inner.keys() == {"full_attention"}:  # rotary settings by kind of layer
        inner = {key: value for key, value in field(inner, "full_attention", dict).items() if value is not None}
    kind = inner.pop("rope_type", None) or inner.get("type", "default")
    inner.pop("type", None)
    if kind in ("linear", "dynamic") and inner.get("factor") == 1:  # no scaling
        kind = "default"
    if kind == "default":
        inner = {key: value for key, value in inner.items() if not _changes_nothing(key, value)}
    if kind not in ("default", "yarn"):
        raise ValueError(
            f'{name}.rope_type = {json.dumps(kind)}: expected "default" or "yarn"; nothing else is implemented'
        )
    taken = {"rope_theta", "partial_rotary_factor"} | ({key for key, *_ in _YARN} if kind == "yarn" else set())
    if inner.get("truncate") is True and kind == "yarn":
        del inner["truncate"]
    turn_scale = field(inner, "attention_factor", float, None) if kind == "yarn" else None
    if turn_scale is not None:
        del inner["attention_factor"]
    if others := sorted(set(inner) - taken):
        raise ValueError(f"{name}.{others[0]} = {json.dumps(inner[others[0]])}: not implemented")
    both = {**fields, **inner}
    settings = {"rope_theta": field(both, "rope_theta", float, theta)}
    if fraction is not None:
        settings["rope_fraction"] = field(both, "partial_rotary_factor", float, fraction)
    elif (given := field(both, "partial_rotary_factor", float, 1.0)) != 1:
        raise ValueError(f"partial_rotary_factor = {given}: expected 1.0; nothing else is implemented for this family")
    if kind == "yarn":
        for key, setting, value_type, default in _YARN:
            try:
                settings[setting] = field(inner, key, value_type, default)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        if turn_scale is not None:
            own = rope.turn_scale(AttentionConfig(kind="latent", qk_norm=False, **settings))
            if not math.isclose(turn_scale, own, rel_tol=1e-6):
                raise ValueError(f"{name}.attention_factor = {turn_scale}: expected {own:.6g}, or none")
    return settings


def _changes_nothing(key: str, value: Any) -> bool:
    """Whether a field that newer libraries add to unscaled rotary settings has no effect."""
    return key == "original_max_position_embeddings" or (key in ("factor", "attention_factor") and value == 1)


def rope_json(attention: AttentionConfig, with_fraction: bool = False) -> dict[str, Any]:
    """The inverse of `rope_settings`, in two forms: transformers 5 reads `rope_parameters`, older readers the rest."""
    theta = {"rope_theta": attention.rope_theta}
    if with_fraction:
        theta["partial_rotary_factor"] = attention.rope_fraction
    if attention.yarn_factor == 1:
        return {"rope_parameters": {"rope_type": "default", **theta}, **theta}
    scaling = {key: getattr(attention, setting) for key, setting, *_ in _YARN}
    scaling = {key: value for key, value in scaling.items() if value or not key.startswith("mscale")}
    return {
        "rope_parameters": {"rope_type": "yarn", **theta, **scaling},
        "rope_scaling": {"rope_type": "yarn", "type": "yarn", **scaling},
        **theta,
    }


_MOST_PREDICTION_LAYERS = 100  # published models have one


def prediction_layers(fields: dict[str, Any], default: int) -> tuple[tuple[str, str], ...]:
    """Multi-token prediction layers, which published checkpoints number after the decoder's: for `Family.skipped`."""
    count = field(fields, "num_nextn_predict_layers", int, default)
    if not 0 <= count <= _MOST_PREDICTION_LAYERS:
        raise ValueError(f"num_nextn_predict_layers = {count}: expected 0 to {_MOST_PREDICTION_LAYERS}")
    first = field(fields, "num_hidden_layers", int)
    return tuple((f"model.layers.{layer}.", "a multi-token prediction layer") for layer in range(first, first + count))


def nothing_skipped(fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """`Family.skipped` of families whose tensors are all used."""
    return ()
