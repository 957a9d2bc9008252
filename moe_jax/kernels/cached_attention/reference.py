"""Attention of one new token per row against a cache, defined by plain loops in numpy."""

import numpy as np


def forward(query_BHA, key_BGA, value_BGX, key_LBMGA, value_LBMGX, layer, position_B, scale, value_channels):
    """As `api.cached_attention`, in float64."""
    key_LBMGA = np.array(key_LBMGA)
    value_LBMGX = None if value_LBMGX is None else np.array(value_LBMGX)
    batch, heads, _ = query_BHA.shape
    mixed_BHX = np.zeros((batch, heads, value_channels))
    for b in range(batch):
        at = int(position_B[b])
        key_LBMGA[layer, b, at] = key_BGA[b]
        if value_LBMGX is not None:
            value_LBMGX[layer, b, at] = value_BGX[b]
        for h in range(heads):
            g = h * key_LBMGA.shape[3] // heads
            key_MA = np.asarray(key_LBMGA[layer, b, : at + 1, g], np.float64)
            value_MX = key_MA[:, :value_channels]
            if value_LBMGX is not None:
                value_MX = np.asarray(value_LBMGX[layer, b, : at + 1, g], np.float64)
            score_M = scale * np.array([key_A @ np.asarray(query_BHA[b, h], np.float64) for key_A in key_MA])
            share_M = np.exp(score_M - score_M.max())
            mixed_BHX[b, h] = sum(share * value_X for share, value_X in zip(share_M / share_M.sum(), value_MX))
    return mixed_BHX, key_LBMGA, value_LBMGX
