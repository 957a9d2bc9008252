"""The supported model families: `config.json` to and from `Architecture`, and names of tensors.

A family is one entry of `FAMILIES`; the code that reads and writes checkpoints knows only `Family` and `names.Rule`.
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
OWN = GLM4_MOE  # for models that are trained here from scratch


def family_of(fields: dict[str, Any]) -> Family:
    """Finds the family that a `config.json` names; ValueError lists the supported ones."""
    model_type = fields.get("model_type")
    inner = fields.get("text_config")
    if model_type not in list(FAMILIES) and isinstance(inner, dict) and inner.get("model_type") in list(FAMILIES):
        raise ValueError(
            f"model_type = {json.dumps(model_type)} has a language model of type {json.dumps(inner['model_type'])} in "
            "text_config, and other parts that are not read: expected a folder of that model alone, with those fields "
            f"as its config.json; supported: {', '.join(sorted(FAMILIES))}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type = {json.dumps(model_type)}: supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
