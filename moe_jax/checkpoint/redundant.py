"""Redundant tensors: the head of tied embeddings, rotary frequencies, positions, biases that are zero.

Other loaders ignore them. They are ignored here too if they agree with the rest of the model. Otherwise they are
refused, since config.json then describes another model than the weights.
"""

import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
from absl import logging

from moe_jax.checkpoint.filling import read_values
from moe_jax.checkpoint.safetensors_file import StoredTensor
from moe_jax.config.architecture import Architecture
from moe_jax.model import rope

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # of an embedding, compared at once


def agreeing(
    folder: pathlib.Path, names: Iterable[str], stored: Mapping[str, StoredTensor], architecture: Architecture
) -> set[str]:
    """The names of redundant tensors among those given, none of which is a parameter.

    Raises:
        ValueError: one contradicts the model.
    """
    found = set()
    for name in names:
        tensor = stored[name]
        if name == _HEAD and _EMBEDDING in stored:
            agrees, expected = _same(tensor, stored[_EMBEDDING]), f"{_EMBEDDING}, to which config.json ties it"
        elif name.endswith("rotary_emb.inv_freq"):
            agrees, expected = _are_frequencies(tensor, architecture), "the frequencies that config.json asks for"
        elif name.endswith("position_ids"):
            agrees, expected = _are_positions(tensor), "the positions 0, 1, ..."
        elif name.endswith(".bias") and not read_values(tensor).astype(np.float32).any():
            agrees, expected = True, ""
        else:
            continue
        if not agrees:
            raise ValueError(f"{tensor.path}: {name} differs from {expected}")
        found.add(name)
    if found:
        logging.info("%s: ignored %d redundant tensors: %s", folder, len(found), ", ".join(sorted(found)[:3]))
    return found


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    first, second = read_values(one), read_values(other)
    for row in range(0, len(first), _ROWS):
        parts = (part[row : row + _ROWS].astype(np.float32) for part in (first, second))
        if not np.array_equal(*parts):
            return False
    return True


def _are_frequencies(tensor: StoredTensor, architecture: Architecture) -> bool:
    """Whether these are the rotary frequencies, with a tolerance for storage in half precision."""
    expected = rope.frequencies(architecture.attention)
    given = read_values(tensor).astype(np.float32)
    relative = 1e-5 if tensor.dtype == np.float32 else 2.0**-7
    return given.shape == expected.shape and np.allclose(given, expected, rtol=relative, atol=1e-7)


def _are_positions(tensor: StoredTensor) -> bool:
    given = read_values(tensor).reshape(-1)
    return np.issubdtype(given.dtype, np.integer) and np.array_equal(given, np.arange(len(given)))
