"""Every field of config.json that is read, in every family, is left out once and given values of wrong types."""

import functools
import json
import re

import pytest

from moe_jax.checkpoint import beside, huggingface
from moe_jax.checkpoint.families import FAMILIES, base
from moe_jax.checkpoint.quantization import blocks_of
from tests.family_variants import VARIANTS

WRONG = ("x", "", ["x"], [[]], {"x": 1}, {}, 1.5, float("nan"), float("inf"), True, False, 0, -1, 10**400, 10**9)
# null differs from leaving out: a projection without a latent; no groups
NULL_HAS_MEANING = ("q_lora_rank", "n_group", "topk_group")
# A default that does not fit the rest is named as the setting that it became.
SETTINGS = {
    "first_k_dense_replace": ("decoder.num_dense_layers",),
    "num_key_value_heads": ("attention.num_kv_heads",),
    "n_group": ("moe.num_groups", "moe.num_groups_kept"),
    "topk_group": ("moe.num_groups_kept",),
}
# Nested objects, and the fields that they may have beside those that we write.
WITHIN = {"rope_parameters": ("attention_factor", "truncate"), "rope_scaling": ("attention_factor", "truncate")}

each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


class Asked(dict):
    """Records which fields are read."""

    def __init__(self, fields):
        super().__init__(fields)
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)


@functools.cache
def fields_of(variant):
    family = FAMILIES[variant.model_type]
    fields = huggingface.config_fields(family, variant.architecture) | {"eos_token_id": 1, "bos_token_id": [2, 3]}
    return json.loads(json.dumps(fields))


def asked_of(fields):
    """The fields that the readers ask for, in order."""
    asked = Asked(fields)
    family = FAMILIES[asked["model_type"]]
    base.with_numbers_of_layers(family.architecture(asked), asked)
    family.skipped(asked)
    blocks_of(asked)
    beside.token_ids_of(asked, {})
    return sorted(asked.names | set(beside.TOKEN_IDS))


def meaning(fields):
    """Everything that the readers derive from the fields."""
    family, architecture = huggingface.describe(fields)
    return architecture, family.skipped(fields), beside.token_ids_of(fields, {})


def refusal(fields):
    """The error message if the fields are refused, else "". Any other exception is a bug."""
    try:
        meaning(fields)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, str(error)[:1000]
        return str(error)
    return ""


def is_named(line, *names):
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", line) for name in names)


def could_be_meant(model_type, path, value):
    """Whether a value has a type that the field has in some variant of its family."""
    if path in beside.TOKEN_IDS:
        return type(value) is int
    known = {type(value_at(fields_of(one), path)) for one in VARIANTS.values() if one.model_type == model_type}
    return type(value) in known | ({int} if float in known else set())


def value_at(fields, path):
    """The value of a field, of the file or of an object in it; None if there is none."""
    name, *key = path.split(".")
    value = fields.get(name)
    return value.get(key[0]) if key and value else value


def changes(fields, name):
    """(the name of the change, fields without the value, fields with another one)."""
    yield name, {key: x for key, x in fields.items() if key != name}, lambda value: fields | {name: value}
    inner = fields.get(name)
    if name in WITHIN and inner:
        for key in [*inner, *WITHIN[name]]:
            without = {one: x for one, x in inner.items() if one != key}
            yield (
                f"{name}.{key}",
                fields | {name: without},
                lambda value, without=without, key=key: fields | {name: without | {key: value}},
            )


@each_variant
def test_a_field_left_out_has_a_default_or_is_named(variant):
    fields, required, faults = fields_of(variant), set(), []
    assert {"hidden_size", "num_experts_per_tok", "rope_theta", "pad_token_id"} <= set(asked_of(fields))
    for name in asked_of(fields):
        for path, without, with_value in changes(fields, name):
            line, null = refusal(without), with_value(None)
            null_line = refusal(null)
            if line:
                required.add(path)
                faults += [] if is_named(line, path, *SETTINGS.get(path, ())) else [f"{path} is left out: {line}"]
            if null_line:
                faults += [] if is_named(null_line, path, *SETTINGS.get(path, ())) else [f"{path} is null: {null_line}"]
            elif name not in NULL_HAS_MEANING and (line or meaning(null) != meaning(without)):
                faults.append(f"{path} is null: taken, other than where it is left out")
    assert faults == []
    assert {"model_type", "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"} <= required


@each_variant
def test_a_value_of_a_wrong_type_is_named(variant):
    fields, faults = fields_of(variant), []
    for name in asked_of(fields):
        for path, without, with_value in changes(fields, name):
            for wrong in WRONG:
                if could_be_meant(variant.model_type, path, wrong):
                    refusal(with_value(wrong))  # by its value, if at all
                elif line := refusal(with_value(wrong)):
                    faults += [] if is_named(line, path) else [f"{path} = {str(wrong)[:20]}: {line}"]
                elif refusal(without) or meaning(with_value(wrong)) != meaning(without):
                    # values that change nothing are accepted: no bias, no window
                    faults.append(f"{path} = {str(wrong)[:20]} is taken")
    assert faults == []
