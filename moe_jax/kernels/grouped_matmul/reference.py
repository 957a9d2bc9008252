"""Grouped matmul defined by a plain loop over the experts, in numpy.

Sums are float64, so that a difference from another implementation is the rounding of that one.
"""

import itertools

import numpy as np

from moe_jax.kernels.quantized import Quantized


def as_array(weights):
    """Weights as an array in NumPy; those in eight bits block by block, in float64."""
    if not isinstance(weights, Quantized):
        return np.asarray(weights)
    values, scale = np.asarray(weights.values, np.float64), np.asarray(weights.scale, np.float64)
    rows, columns = weights.block
    for down, across in itertools.product(range(scale.shape[-2]), range(scale.shape[-1])):
        block = np.s_[..., down * rows : (down + 1) * rows, across * columns : (across + 1) * columns]
        values[block] *= scale[..., down, across, None, None]
    return values


def forward(rows_SD, weights_LEFD, group_sizes_E, layer):
    """Multiplies each group of rows by the matrix of its expert.

    Args:
        rows_SD: rows sorted by expert; those after the last group belong to no expert.
        weights_LEFD: one matrix per layer and expert, outputs first, as checkpoints store them; may be in eight bits.
        group_sizes_E: rows of each expert, in order.
        layer: which layer of the stack.

    Returns:
        out_SF; zero for rows of no expert.
    """
    rows_SD, weights_LEFD = np.asarray(rows_SD), as_array(weights_LEFD)
    out_SF = np.zeros((rows_SD.shape[0], weights_LEFD.shape[2]), rows_SD.dtype)
    first = 0
    for expert, size in enumerate(np.asarray(group_sizes_E)):
        last = first + int(size)
        out_SF[first:last] = rows_SD[first:last].astype(np.float64) @ weights_LEFD[layer, expert].astype(np.float64).T
        first = last
    return out_SF


def backward(rows_SD, weights_LEFD, group_sizes_E, layer, out_grad_SF):
    """The gradients of `forward` for rows and weights, given the gradient of its output."""
    rows_SD, weights_LEFD, out_grad_SF = np.asarray(rows_SD), np.asarray(weights_LEFD), np.asarray(out_grad_SF)
    rows_grad_SD = np.zeros_like(rows_SD)
    weights_grad_LEFD = np.zeros_like(weights_LEFD)
    first = 0
    for expert, size in enumerate(np.asarray(group_sizes_E)):
        last = first + int(size)
        out_grad = out_grad_SF[first:last].astype(np.float64)
        rows_grad_SD[first:last] = out_grad @ weights_LEFD[layer, expert].astype(np.float64)
        weights_grad_LEFD[layer, expert] = out_grad.T @ rows_SD[first:last].astype(np.float64)
        first = last
    return rows_grad_SD, weights_grad_LEFD
