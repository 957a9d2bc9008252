"""Splits parameters into those that train and those that are frozen, and joins them again."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.config import layer_order
from moe_jax.config.finetuning import FinetuneConfig
from moe_jax.model import parameters
from moe_jax.model.decoder import Params
from moe_jax.model.low_rank import LowRank
from moe_jax.model.sharding import pieces_on_host
from moe_jax.routing import mask

_ADAPTED = ("attention", "experts", "shared")  # modules whose matrices LoRA adapts


def divide(params: Params, config: FinetuneConfig, dtype: str, seed: int) -> tuple[Params, Params]:
    """Splits parameters into those that train and those that are frozen.

    Args:
        params: nested dicts of arrays, as loaded, without the selection bias.
        config: `train` says which parameters train; `mask` adds a trained mask of experts.
        dtype: the dtype of trained matrices; norms, routers and LoRA's factors are float32.
        seed: the seed of LoRA's first factor.

    Returns:
        The trained parameters, which are copies, and the frozen ones, which are the given arrays. With LoRA a trained
        matrix is {"down", "up"}, and its base is frozen.
    """
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))

    def split(value, path: tuple[str, ...]):
        if isinstance(value, dict):
            # sorted, so that random factors do not depend on the order in which weights were loaded
            trained, frozen = {}, {}
            for name, part in sorted(value.items()):
                trained_part, frozen_part = split(part, (*path, name))
                trained |= {} if trained_part is None else {name: trained_part}
                frozen |= {} if frozen_part is None else {name: frozen_part}
            return trained, frozen
        key, parameter = next(keys), parameters.find(path)
        if config.train == "lora":
            adapted = parameter.kind is parameters.Matrix and any(module in path for module in _ADAPTED)
            return (_factors(parameter, value, config.lora_rank, key) if adapted else None), value
        router, norm = "router" in path, parameter.kind is parameters.Norm
        in_float32 = norm or router
        trains = config.train == "all" or router or (config.train == "router_and_norms" and norm)
        if not trains:
            return None, value
        return jnp.array(value, jnp.float32 if in_float32 else dtype, copy=True), None

    trained, frozen = (_without_empty(part) for part in split(params, ()))
    if config.mask:
        for stack in layer_order.moe_stacks(params):
            router = trained.setdefault(stack, {}).setdefault("router", {})
            router["mask_LE"] = jnp.full(params[stack]["router"]["weight_LED"].shape[:2], mask.START, jnp.float32)
    return trained, frozen


def _factors(parameter: parameters.Parameter, weight: jax.Array, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """LoRA's factors: the first random, the second zero, so that their product starts at zero."""
    num_stacked, num_inputs = parameter.num_stacked, len(parameter.inputs)
    stacked, inputs = weight.shape[:num_stacked], weight.shape[weight.ndim - num_inputs :]
    outputs = weight.shape[num_stacked : weight.ndim - num_inputs]
    down = jax.random.normal(key, (*stacked, rank, *inputs), jnp.float32) * math.prod(inputs) ** -0.5
    return {"down": down, "up": jnp.zeros((*stacked, *outputs, rank), jnp.float32)}


def _without_empty(params: Params) -> Params:
    parts = {name: _without_empty(part) if isinstance(part, dict) else part for name, part in params.items()}
    return {name: part for name, part in parts.items() if not isinstance(part, dict) or part}


def join(trained: Params, frozen: Params, lora_scale: float) -> Params:
    """The inverse of `divide`; matrices that LoRA adapts become `LowRank` with scale `lora_scale` = alpha / rank."""
    joined = dict(frozen)
    for name, part in trained.items():
        base = joined.get(name)
        if base is None:
            joined[name] = part
        elif isinstance(base, dict):
            joined[name] = join(part, base, lora_scale)
        else:
            joined[name] = LowRank(base, part["down"], part["up"], lora_scale)
    return joined


def merge_all(trained: Params, frozen: Params, lora_scale: float) -> Params:
    """All parameters as plain arrays; LoRA is merged one layer at a time."""
    return jax.tree.map(
        lambda weight: _merge_layers(weight) if isinstance(weight, LowRank) else weight,
        join(trained, frozen, lora_scale),
        is_leaf=lambda weight: isinstance(weight, LowRank),
    )


@jax.jit
def _merge_layers(weight: LowRank) -> jax.Array:
    return lax.map(LowRank.merged, weight)


def digest(params: Params) -> str:
    """SHA-256 of all parameters: their paths, dtypes, shapes and values."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        for piece in pieces_on_host(leaf):
            total.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    return total.hexdigest()


def num_bytes(params: Params) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
