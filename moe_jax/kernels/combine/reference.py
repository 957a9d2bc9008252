"""Copying tokens to sorted rows and adding up the weighted results, defined by plain loops in numpy."""

import numpy as np


def spread(x_ND, token_S):
    """Row s of the result is the token of sorted row s."""
    x_ND = np.asarray(x_ND)
    return np.stack([x_ND[token] for token in np.asarray(token_S)])


def combine(out_SD, weight_NK, position_NK):
    """Adds up each token's slots, weighted, in float32."""
    out_SD, weight_NK, position_NK = np.asarray(out_SD), np.asarray(weight_NK), np.asarray(position_NK)
    y_ND = np.zeros((len(weight_NK), out_SD.shape[1]), np.float32)
    for token, (weights, positions) in enumerate(zip(weight_NK, position_NK)):
        for weight, position in zip(weights, positions):
            y_ND[token] += weight * out_SD[position].astype(np.float32)
    return y_ND
