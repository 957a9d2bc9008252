"""The model families that can be read and written: `config.json` to and from `Architecture`, and names of tensors.

A family is one row of `FAMILIES`; what reads and writes checkpoints knows only `Family` and `names.Rule`.
"""

import json
from typing import Any

from moe_jax.checkpoint.families.base import Family
from moe_jax.checkpoint.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from moe_jax.checkpoint.families.glm import GLM4_MOE
from moe_jax.checkpoint.families.mixtral import MIXTRAL
from moe_jax.checkpoint.families.olmoe import OLMOE
from moe_jax.checkpoint.families.qwen import QWEN2_MOE, QWEN3_MOE

_ALL = (DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE, KIMI_K2, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
OWN = GLM4_MOE  # of models that begin here, trained from scratch


def family_of(fields: dict[str, Any]) -> Family:
    """Finds the family that a `config.json` names; ValueError lists the supported ones."""
    model_type = fields.get("model_type")
    inner = fields.get("text_config")
    if model_type not in list(FAMILIES) and isinstance(inner, dict) and inner.get("model_type") in list(FAMILIES):
        raise ValueError(
            f"model_type = {json.dumps(model_type)[:100]} has a language model of type "
            f"{json.dumps(inner['model_type'])} in text_config, beside what is not read: expected a folder of that "
            "model alone, with those fields as its config.json; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type = {json.dumps(model_type)[:100]}: supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
