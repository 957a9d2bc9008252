"""Removes experts from a model: the smaller architecture, and its weights."""

import dataclasses

import numpy as np

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture
from moe_jax.model import parameters
from moe_jax.model.decoder import Params
from moe_jax.study.pruning import Kept


def architecture_of(architecture: Architecture, kept: Kept) -> Architecture:
    """The architecture with the kept experts only: each layer's k is unchanged.

    Raises:
        ValueError: a layer has fewer experts than its k, or the groups of experts do not allow it.
    """
    return with_experts(architecture, tuple(len(experts) for experts in kept))


def with_experts(architecture: Architecture, experts_L: tuple[int, ...]) -> Architecture:
    """The architecture with other numbers of experts in its MoE layers.

    Raises:
        ValueError: as `architecture_of`.
    """
    unlike = experts_L if len({*experts_L}) > 1 else ()
    moe = dataclasses.replace(architecture.moe, num_experts=max(experts_L), num_experts_of_layers=unlike)
    return dataclasses.replace(architecture, moe=moe)


def without_others(params: Params, architecture: Architecture, kept: Kept) -> Params:
    """The weights of `architecture_of`: every parameter with one entry per expert has those of the kept ones.

    Layers that keep as many experts share a stack (`layer_order.stacks`), so layers may change stacks.

    Args:
        params: of the whole model, as `Checkpoint.read` or `load` gives them; not changed.
        architecture: of the whole model.
        kept: experts of each MoE layer.
    """
    smaller = architecture_of(architecture, kept)
    layers = layer_order.layers(architecture)
    stacks = layer_order.stacks(smaller)
    pruned: Params = {}
    for parameter in parameters.of(smaller):
        *modules, name = parameter.path.split("/")
        node = pruned
        for module in modules:
            node = node.setdefault(module, {})
        if parameter.letters[0] == "L":
            node[name] = np.stack([_of_layer(params, layers[number], parameter, kept) for number in stacks[modules[0]]])
        else:
            node[name] = _at(params, (*modules, name))
    return pruned


def _of_layer(params: Params, layer: layer_order.Layer, parameter: parameters.Parameter, kept: Kept) -> np.ndarray:
    value = np.asarray(_at(params, (layer.stack, *parameter.path.split("/")[1:]))[layer.index])
    letters = parameter.letters[1:]
    return value.take(kept[layer.column], axis=letters.index("E")) if "E" in letters else value


def _at(params: Params, path) -> np.ndarray:
    for module in path:
        params = params[module]
    return params
