"""The product, defined by plain loops over rows and outputs, in float64."""

import itertools
import math

import numpy as np


def forward(x, stack, layer, contracted):
    """As `api.projection`, unrounded."""
    x, weight = np.asarray(x, np.float64), np.asarray(stack, np.float64)[int(layer)]
    inputs = weight.shape[len(weight.shape) - contracted :]
    before, outputs = x.shape[: x.ndim - contracted], weight.shape[: weight.ndim - contracted]
    rows, columns = x.reshape(-1, math.prod(inputs)), weight.reshape(-1, math.prod(inputs))
    out = np.zeros((len(rows), len(columns)))
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        out[row, column] = sum(a * b for a, b in zip(rows[row], columns[column]))
    return out.reshape(*before, *outputs)
