"""Shared by all model families: reading fields of `config.json`, refusing unsupported values, and common sections."""

import dataclasses
import json
import math
import sys
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
        architecture: reads the architecture from `config.json`; ValueError names an unsupported field.
        config_json: the inverse, without token ids and dtype; ValueError names a setting that the family lacks.
        rules: maps the parameters of an architecture to tensors.
        skipped: (prefix of tensor names, what they are) of tensors that a checkpoint may have and that we do not use.
    """

    model_type: str
    architecture: Callable[[dict[str, Any]], Architecture]
    config_json: Callable[[Architecture], dict[str, Any]]
    rules: Callable[[Architecture], tuple[Rule, ...]]
    skipped: Callable[[dict[str, Any]], tuple[tuple[str, str], ...]]


# Fields that change the computation, with the values that our decoder supports. The first is the value of an absent
# field.
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
    """Raises ValueError if a field has a value that `neutral` does not list."""
    for name, accepted in neutral.items():
        value = fields.get(name, accepted[0])
        if name == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if name == "moe_layer_freq" and isinstance(value, list) and value == _prefix_then_moe(fields):
            continue
        if value not in accepted or type(value) not in map(type, accepted):
            expected = " or ".join(map(json.dumps, accepted))
            raise ValueError(f"{name} = {json.dumps(value)[:100]}: expected {expected}; nothing else is implemented")


def _prefix_then_moe(fields: dict[str, Any]) -> list[int]:
    """For each layer 0 in the dense prefix and 1, for MoE, after it."""
    dense = field(fields, "first_k_dense_replace", int, 0)
    return [int(layer >= dense) for layer in range(num_layers(fields))]


def require_settings(model_type: str, architecture: Architecture, only: dict[str, Any]) -> None:
    """Raises ValueError if a setting (`section.field`) differs from the only value that a family supports."""
    for setting, expected in only.items():
        section, name = setting.split(".")
        given = getattr(getattr(architecture, section), name)
        if given != expected:
            raise ValueError(f"{setting} = {given!r}: the Hugging Face family {model_type} only has {expected!r}")


_MOST_LAYERS = 10_000  # more than any model has; bounds lists with an entry per layer


def num_layers(fields: dict[str, Any]) -> int:
    """`num_hidden_layers`; ValueError if it is larger than that of any model."""
    count = field(fields, "num_hidden_layers", int)
    if count > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers = {count}: expected at most {_MOST_LAYERS}")
    return count


def dense_hidden(fields: dict[str, Any], num_dense_layers: int) -> int:
    """`intermediate_size`, the width of dense layers; required if there are any."""
    return field(fields, "intermediate_size", int, _REQUIRED if num_dense_layers else 0)


def dense_layers(fields: dict[str, Any], is_dense: Callable[[int], bool]) -> dict[str, Any]:
    """`num_dense_layers` and `dense_layers` of a model in which `is_dense(layer)` is true of dense layers."""
    count = num_layers(fields)
    places = tuple(filter(is_dense, range(count)))
    return {"num_dense_layers": len(places), "dense_layers": () if places == tuple(range(len(places))) else places}


# Numbers for each MoE layer in order, if they differ. These fields are our own: published families have one number for
# all layers, which is then the largest.
_OF_LAYERS = {"num_experts_of_layers": "num_experts_of_layers", "num_experts_per_tok_of_layers": "k_of_layers"}
OF_LAYERS = tuple(_OF_LAYERS)


def with_numbers_of_layers(architecture: Architecture, fields: dict[str, Any]) -> Architecture:
    """Adds the per-layer numbers of `config.json` to an architecture; ValueError if they do not fit."""
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


# The settings of families without latent attention, selection bias, expert groups or scaling.
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


_LARGEST = 2**31 - 1  # no size in a model is larger


def field(fields: dict[str, Any], name: str, kind: type, default: Any = _REQUIRED, *, older: str | None = None) -> Any:
    """Reads one field; null counts as absent, and an integer as a float.

    Args:
        fields: of `config.json`, or of an object in it.
        name: the name of the field.
        kind: bool, int, float, str, list or dict.
        default: the value if it is absent; without a default, the field is required.
        older: an earlier name of the field, read if `name` is absent.

    Raises:
        ValueError: it is required and absent, has another type, or is a number out of range.
    """
    if older is not None and fields.get(name) is None and fields.get(older) is not None:
        name = older
    value = fields.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{name} is missing: expected {kind.__name__}")
        return default
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} = {json.dumps(value)[:100]}: expected {kind.__name__}")
    if kind is int and abs(value) > _LARGEST:
        raise ValueError(f"{name} = {str(value)[:100]}: expected at most {_LARGEST}")
    if kind is float:
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} = {str(value)[:100]}: expected a finite number")
        return float(value)
    return value


def trunk(fields: dict[str, Any], *, norm_eps: float, max_context: int, **dense: Any) -> DecoderConfig:
    """Reads the settings of the decoder as a whole.

    Args:
        fields: of `config.json`.
        norm_eps: the default.
        max_context: the default.
        **dense: `num_dense_layers`, `dense_layers` and `dense_hidden`.
    """
    return DecoderConfig(
        vocab_size=field(fields, "vocab_size", int),
        d_model=field(fields, "hidden_size", int),
        num_layers=num_layers(fields),
        norm_eps=field(fields, "rms_norm_eps", float, norm_eps),
        tie_embeddings=field(fields, "tie_word_embeddings", bool, False),
        max_context=field(fields, "max_position_embeddings", int, max_context),
        **dense,
    )


def trunk_json(decoder: DecoderConfig) -> dict[str, Any]:
    """The inverse of `trunk`, without the dense layers."""
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
    """Reads `num_heads`, `num_kv_heads` and `head_dim`.

    Args:
        fields: of `config.json`.
        kv_heads: the default; None: `num_heads`.
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


# For each field of YaRN: our setting, its type, and its default.
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
    """Reads `rope_theta`, the settings of YaRN, and `rope_fraction` if the family has a default fraction.

    `rope_parameters` (formerly `rope_scaling`) takes precedence over top-level fields.

    Args:
        fields: of `config.json`.
        theta: the default.
        fraction: the default; None: the family rotates whole heads.
    """
    name = "rope_scaling" if field(fields, "rope_scaling", dict, {}) else "rope_parameters"
    inner = _given(field(fields, name, dict, {}))
    if inner.keys() == {"full_attention"}:  # other layer types might have their own rotary angles
        name, inner = f"{name}.full_attention", _given(_field_of(name, inner, "full_attention", dict))
    kind = _field_of(name, inner, "rope_type", str, None, older="type") or "default"
    inner = {key: value for key, value in inner.items() if key not in ("rope_type", "type")}
    if kind in ("linear", "dynamic") and inner.get("factor") == 1:  # scales by 1
        kind = "default"
    if kind not in ("default", "yarn"):
        raise ValueError(
            f'{name}.rope_type = {json.dumps(kind)[:100]}: expected "default" or "yarn"; nothing else is implemented'
        )
    taken = {"rope_theta", "partial_rotary_factor"}
    if kind == "default":
        taken |= {key for key in inner if _changes_nothing(name, inner, key)}
    else:
        taken |= {key for key, *_ in _YARN} | {"attention_factor"}
        taken |= {"truncate"} if inner.get("truncate") is True else set()
    if others := sorted(set(inner) - taken):
        raise ValueError(f"{name}.{others[0]} = {json.dumps(inner[others[0]])[:100]}: not implemented")
    top = {
        key: field(fields, key, float, default)
        for key, default in (("rope_theta", theta), ("partial_rotary_factor", 1.0 if fraction is None else fraction))
    }
    theta, given = (_field_of(name, inner, key, float, default) for key, default in top.items())
    settings = {"rope_theta": theta}
    if fraction is not None:
        settings["rope_fraction"] = given
    elif given != 1:
        raise ValueError(f"partial_rotary_factor = {given}: expected 1.0; nothing else is implemented for this family")
    return settings | (_yarn_settings(name, inner, settings) if kind == "yarn" else {})


def _yarn_settings(name: str, inner: dict[str, Any], settings: dict[str, float]) -> dict[str, float | int]:
    """Reads the settings of YaRN from `inner`, the object `name` of `config.json`."""
    yarn = {setting: _field_of(name, inner, key, kind, default) for key, setting, kind, default in _YARN}
    rotary_scale = _field_of(name, inner, "attention_factor", float, None)
    if rotary_scale is not None:
        own = rope.rotary_scale(AttentionConfig(kind="latent", qk_norm=False, **settings, **yarn))
        if not math.isclose(rotary_scale, own, rel_tol=1e-6):
            raise ValueError(f"{name}.attention_factor = {rotary_scale}: expected {own:.6g}, or none")
    return yarn


def _field_of(name: str, inner: dict[str, Any], key: str, kind: type, *default: Any, **options: Any) -> Any:
    """As `field`, for the object `name` of `config.json`; errors name the object too."""
    try:
        return field(inner, key, kind, *default, **options)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def _given(inner: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {key: value for key, value in inner.items() if value is not None}


def _changes_nothing(name: str, inner: dict[str, Any], key: str) -> bool:
    """Whether a field that newer libraries add to unscaled rotary angles has no effect."""
    if key == "original_max_position_embeddings":
        return _field_of(name, inner, key, int) is not None
    return key in ("factor", "attention_factor") and _field_of(name, inner, key, float) == 1


def rope_json(attention: AttentionConfig, with_fraction: bool = False) -> dict[str, Any]:
    """The inverse of `rope_settings`, written twice: transformers 5 reads `rope_parameters`, older ones the rest."""
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
    """Multi-token prediction layers, which checkpoints have after those of the decoder, as `Family.skipped`."""
    count = field(fields, "num_nextn_predict_layers", int, default)
    if not 0 <= count <= _MOST_PREDICTION_LAYERS:
        raise ValueError(f"num_nextn_predict_layers = {count}: expected 0 to {_MOST_PREDICTION_LAYERS}")
    first = num_layers(fields)
    return tuple((f"model.layers.{layer}.", "a multi-token prediction layer") for layer in range(first, first + count))


def nothing_skipped(fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """`Family.skipped` of families in whose checkpoints we use every tensor."""
    return ()
