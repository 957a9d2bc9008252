"""The dtypes of a model in memory: of its activations, and of its routed experts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels import quantized
from moe_jax.kernels.quantized import Quantized


def dtype_of(params: Mapping[str, Any]) -> jnp.dtype:
    """The dtype of activations and caches: the narrowest of the weights, but for experts in eight bits.

    Products with wider weights run in the weights' dtype; their results are rounded to this one.
    """
    weights = jax.tree.leaves(params, is_leaf=quantized.is_quantized)
    dtypes = (weight.dtype for weight in weights if not quantized.is_quantized(weight))
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def experts_dtype(params: Mapping[str, Any]) -> str:
    """The dtype in which the routed experts' products run: of their weights or, in eight bits, of activations."""
    down_LEDF = _experts(params)["down_LEDF"]
    return (dtype_of(params) if isinstance(down_LEDF, Quantized) else down_LEDF.dtype).name


def eight_bits_of(params: Mapping[str, Any]) -> str:
    """The dtype of the routed experts' weights if they are in eight bits; "" if they are not."""
    down_LEDF = _experts(params)["down_LEDF"]
    return down_LEDF.values.dtype.name if isinstance(down_LEDF, Quantized) else ""


def expert_itemsize(params: Mapping[str, Any]) -> float:
    """Bytes of a routed expert's weight, with its share of the scales if it is in eight bits."""
    experts = [part["experts"] for part in params.values() if isinstance(part, dict) and "experts" in part]
    numbers = sum(weight.size for one in experts for weight in one.values())
    return sum(leaf.nbytes for leaf in jax.tree.leaves(experts)) / numbers


def _experts(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the first MoE layers."""
    return next(part["experts"] for part in params.values() if isinstance(part, dict) and "experts" in part)
