"""Grouped matmul defined by a plain loop over the experts, in numpy."""

import numpy as np


def forward(rows_SD, weights_LEDF, group_sizes_E, layer):
    """Multiplies each group of rows by the matrix of its expert.

    Args:
        rows_SD: rows sorted by expert; those behind the last group belong to nobody.
        weights_LEDF: one matrix per layer and expert.
        group_sizes_E: rows of each expert, in order.
        layer: which layer of the stack.

    Returns:
        out_SF. Rows that belong to nobody are zero.
    """
    rows_SD, weights_LEDF = np.asarray(rows_SD), np.asarray(weights_LEDF)
    out_SF = np.zeros((rows_SD.shape[0], weights_LEDF.shape[-1]), rows_SD.dtype)
    first = 0
    for expert, size in enumerate(np.asarray(group_sizes_E)):
        last = first + int(size)
        out_SF[first:last] = rows_SD[first:last].astype(np.float32) @ weights_LEDF[layer, expert].astype(np.float32)
        first = last
    return out_SF


def backward(rows_SD, weights_LEDF, group_sizes_E, layer, out_grad_SF):
    """The gradients of `forward` for the rows and for the weights, given that of its output."""
    rows_SD, weights_LEDF, out_grad_SF = np.asarray(rows_SD), np.asarray(weights_LEDF), np.asarray(out_grad_SF)
    rows_grad_SD = np.zeros_like(rows_SD)
    weights_grad_LEDF = np.zeros_like(weights_LEDF)
    first = 0
    for expert, size in enumerate(np.asarray(group_sizes_E)):
        last = first + int(size)
        out_grad = out_grad_SF[first:last].astype(np.float32)
        rows_grad_SD[first:last] = out_grad @ weights_LEDF[layer, expert].astype(np.float32).T
        weights_grad_LEDF[layer, expert] = rows_SD[first:last].astype(np.float32).T @ out_grad
        first = last
    return rows_grad_SD, weights_grad_LEDF
