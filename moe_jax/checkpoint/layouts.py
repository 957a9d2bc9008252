"""Layouts in which the parameters of a family are found beside the published one, known by the names of tensors.

A model may be saved without its head, or within one that sees images too: its names then begin otherwise. In version 5
transformers holds all experts of a layer in one tensor, and may save them so.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from absl import logging

from moe_jax.checkpoint.names import Rule
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.config.architecture import Architecture
from moe_jax.config.layers import kind_of

_TRUNK, _EMBEDDING, _HEAD = "model.", "embed_tokens.weight", "lm_head."
# parameter -> what follows the layer in the name of its tensor, and how that is stored
_STACKED = {
    "moe/experts/gate_up_LEIFD": (".mlp.experts.gate_up_proj", "E IF D"),
    "moe/experts/down_LEDF": (".mlp.experts.down_proj", "E D F"),
    "moe/router/weight_LED": (".mlp.gate.weight", "E D"),
}


def with_published_names(folder: pathlib.Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The table with names that begin with `model.` and `lm_head.`, whatever they begin with in the files.

    Raises:
        ValueError: two tensors would have one name.
    """
    starts = {name.removesuffix(_EMBEDDING) for name in stored if f".{name}".endswith(f".{_EMBEDDING}")}
    starts = {start for start in starts if "layers." not in start}  # prediction layers have embeddings of their own
    if len(starts) != 1 or starts == {_TRUNK}:
        return dict(stored)
    [start] = starts
    around = start.removesuffix(_TRUNK) if f".{start}".endswith(f".{_TRUNK}") else start  # language_model. is one word
    heads = (around + _HEAD, _HEAD)
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
    """The rules as these tensors are named: those of a family or, where there are such tensors, stacked ones."""

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
    """Says how a tensor's shape differs from what is expected."""
    turned = len(expected) == 3 and stored.shape == (expected[0], expected[2], expected[1])
    hint = ": its matrices are stored inputs first, which is not read" if turned else ""
    return f"{stored.path}: {name} has shape {stored.shape}: config.json asks for {expected}{hint}"


def _stacked(rule: Rule) -> Rule | None:
    stack, slash, within = rule.parameter.partition("/")
    parameter = kind_of(stack) + slash + within
    if parameter not in _STACKED:
        return None
    suffix, stored = _STACKED[parameter]
    return dataclasses.replace(rule, tensor=f"model.layers.{{L}}{suffix}", stored=stored)
