"""Other layouts of a family's tensors than the published one, recognised by the names of tensors.

Names have another prefix if a model was saved without its head, or as part of a multimodal model. transformers 5
holds all experts of a layer in one tensor, and may save them so.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from absl import logging

from moe_jax.checkpoint.names import Rule
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.config.architecture import Architecture
from moe_jax.config.layer_order import kind_of

_TRUNK, _EMBEDDING, _HEAD = "model.", "embed_tokens.weight", "lm_head."
# parameter -> what follows the layer in the name of its tensor, and how that is stored
_STACKED = {
    "moe/experts/gate_up_LEIFD": (".mlp.experts.gate_up_proj", "E IF D"),
    "moe/experts/down_LEDF": (".mlp.experts.down_proj", "E D F"),
    "moe/router/weight_LED": (".mlp.gate.weight", "E D"),
}


def with_published_names(folder: pathlib.Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The table with names that begin with `model.` and `lm_head.`, whatever their prefix in the files.

    Raises:
        ValueError: two tensors would get the same name.
    """
    starts = {name.removesuffix(_EMBEDDING) for name in stored if f".{name}".endswith(f".{_EMBEDDING}")}
    starts = {start for start in starts if "layers." not in start}  # prediction layers have embeddings of their own
    if len(starts) != 1 or starts == {_TRUNK}:
        return dict(stored)
    [start] = starts
    prefix = start.removesuffix(_TRUNK) if f".{start}".endswith(f".{_TRUNK}") else start  # language_model. is one word
    heads = (prefix + _HEAD, _HEAD)
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        head = next((one for one in heads if name.startswith(one)), None)
        if head is not None:
            published = _HEAD + name.removeprefix(head)
        else:
            published = _TRUNK + name.removeprefix(start) if name.startswith(start) else name
        if published in renamed:
            raise ValueError(f"{folder}: {name} is one of two tensors that would be {published}")
        renamed[published] = tensor
    logging.warning("%s: %s and others are read as %s", folder, start + _EMBEDDING, _TRUNK + _EMBEDDING)
    return renamed


def rules_of(
    folder: pathlib.Path, rules: tuple[Rule, ...], architecture: Architecture, stored: Mapping[str, StoredTensor]
) -> tuple[Rule, ...]:
    """The rules that fit these tensors: those of a family or, where all experts are in one tensor, stacked ones."""

    def is_stored(rule: Rule) -> bool:
        return rule.first_tensor(architecture) in stored

    chosen = []
    for rule in rules:
        other = _stacked(rule)
        chosen.append(rule if other is None or is_stored(rule) or not is_stored(other) else other)
    if tuple(chosen) != rules:
        logging.info("%s: all experts of a layer are in one tensor", folder)
    return tuple(chosen)


def shape_complaint(name: str, stored: StoredTensor, expected: tuple[int, ...]) -> str:
    """The message for a tensor whose shape is not the expected one."""
    turned = len(expected) == 3 and stored.shape == (expected[0], expected[2], expected[1])
    hint = ": its matrices are stored inputs first, which is not supported" if turned else ""
    return f"{stored.path}: {name} has shape {stored.shape}: config.json asks for {expected}{hint}"


def _stacked(rule: Rule) -> Rule | None:
    stack, slash, within = rule.parameter.partition("/")
    parameter = kind_of(stack) + slash + within
    if parameter not in _STACKED:
        return None
    suffix, stored = _STACKED[parameter]
    return dataclasses.replace(rule, tensor=f"model.layers.{{L}}{suffix}", stored=stored)
