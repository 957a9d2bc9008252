"""Weights stored in eight bits with a scale for each block, as DeepSeek-V3 publishes them (arXiv 2412.19437, 3.3.2).

A tensor `name` of F8_E4M3 comes with `name_scale_inv`, one scale for each block of rows and columns; the last blocks
may be smaller. A weight is its stored value times the scale of its block.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.checkpoint.safetensors_file import FLOATS, StoredTensor
from moe_jax.kernels import quantized

FLOAT8 = np.dtype(quantized.FLOAT8)
SCALE_SUFFIX = "_scale_inv"
# Fields about activations and about tensors that were not quantised. Not needed: the tensors' dtypes say it.
_UNUSED = ("activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt")
# Fields that newer libraries add, with the values that have no effect.
_NEUTRAL = {"dequantize": False, "expert_dtype": "fp8"}


class Blocks(NamedTuple):
    """The size of the blocks that share a scale."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


def blocks_of(fields: Mapping[str, Any]) -> Blocks | None:
    """Reads `quantization_config` of a `config.json`; None if there is none.

    Raises:
        ValueError: it describes anything but FP8 with a scale for each block.
    """
    given = fields.get("quantization_config")
    if given is None or given == {}:
        return None
    expected = 'expected {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, or none'
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method != "fp8":
        raise ValueError(f"quantization_config.quant_method = {_text(method)}: {expected}")
    if given.get("fmt", "e4m3") != "e4m3":
        raise ValueError(f"quantization_config.fmt = {_text(given['fmt'])}: {expected}")
    size = given.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        raise ValueError(f"quantization_config.weight_block_size = {_text(size)}: {expected}")
    given = {name: x for name, x in given.items() if x is not None and (name not in _NEUTRAL or x != _NEUTRAL[name])}
    if others := sorted(set(given) - {"quant_method", "fmt", "weight_block_size", *_UNUSED}):
        raise ValueError(f"quantization_config.{others[0]} = {_text(given[others[0]])}: not implemented; {expected}")
    return Blocks(*size)


def config_of(blocks: Blocks, not_quantized: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a model with tensors in FP8, given the names of the modules that are not."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(blocks),
        "modules_to_not_convert": list(not_quantized),
    }


def take_scales(stored: dict[str, StoredTensor], blocks: Blocks | None) -> dict[str, StoredTensor]:
    """Removes the scales from a table of tensors, and returns them by the name of the tensor that they scale.

    Raises:
        ValueError: a tensor lacks its scales, scales lack their tensor, or either has the wrong shape or dtype.
    """
    scales = {}
    for name, one in stored.items():
        if one.dtype != FLOAT8:
            continue
        if blocks is None:
            raise ValueError(f"{one.path}: {name} is stored as F8_E4M3: config.json has no quantization_config for it")
        if len(one.shape) != 2:
            raise ValueError(f"{one.path}: {name} is F8_E4M3 and has shape {one.shape}: expected a matrix")
        if name + SCALE_SUFFIX not in stored:
            raise ValueError(f"{one.path}: {name} is F8_E4M3, and its scales {name + SCALE_SUFFIX} are missing")
        scale = stored[name + SCALE_SUFFIX]
        if scale.dtype not in FLOATS - {FLOAT8} or scale.shape != blocks.scale_shape(one.shape):
            raise ValueError(
                f"{scale.path}: {name + SCALE_SUFFIX} has shape {scale.shape} and dtype {scale.dtype.name}: expected "
                f"{blocks.scale_shape(one.shape)}, a float32 for each block of {name}"
            )
        scales[name] = scale
    if blocks is not None:
        for name, one in stored.items():
            if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) not in scales:
                raise ValueError(f"{one.path}: {name} scales no tensor that is stored as F8_E4M3")
    for name in scales:
        del stored[name + SCALE_SUFFIX]
    return scales


def dequantize(values: np.ndarray, scale: np.ndarray, blocks: Blocks, first_row: int) -> np.ndarray:
    """Converts some rows of a matrix to float32.

    Args:
        values: F8_E4M3 [rows, columns].
        scale: float32, of all blocks of the matrix.
        blocks: the size of the blocks that share a scale.
        first_row: the index of the first of these rows within the matrix.
    """
    wide = values.astype(np.float32)
    row_blocks = (first_row + np.arange(values.shape[0])) // blocks.rows
    for block in range(scale.shape[1]):
        columns = slice(block * blocks.columns, (block + 1) * blocks.columns)
        wide[:, columns] *= scale[row_blocks, block, None]
    return wide


def _text(value: Any) -> str:
    return json.dumps(value)[:100]
