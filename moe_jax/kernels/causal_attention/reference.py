"""Causal attention, defined by plain loops in numpy."""

import numpy as np


def forward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale):
    """As `api.causal_attention`, in float64."""
    query_BTHA, key_BMGA, value_BMGX = (np.asarray(x, np.float64) for x in (query_BTHA, key_BMGA, value_BMGX))
    mixed_BTHX = np.zeros((*query_BTHA.shape[:3], value_BMGX.shape[-1]))
    for b, t, h, g, seen_M in _queries(query_BTHA, key_BMGA, segments_BM, start_B):
        share_M = _softmax(scale * key_BMGA[b, seen_M, g] @ query_BTHA[b, t, h])
        mixed_BTHX[b, t, h] = share_M @ value_BMGX[b, seen_M, g]
    return mixed_BTHX


def backward(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, scale, mixed_grad_BTHX):
    """The gradients for queries, keys and values."""
    query_BTHA, key_BMGA, value_BMGX, mixed_grad_BTHX = (
        np.asarray(x, np.float64) for x in (query_BTHA, key_BMGA, value_BMGX, mixed_grad_BTHX)
    )
    query_grad_BTHA, key_grad_BMGA, value_grad_BMGX = map(np.zeros_like, (query_BTHA, key_BMGA, value_BMGX))
    for b, t, h, g, seen_M in _queries(query_BTHA, key_BMGA, segments_BM, start_B):
        share_M = _softmax(scale * key_BMGA[b, seen_M, g] @ query_BTHA[b, t, h])
        share_grad_M = value_BMGX[b, seen_M, g] @ mixed_grad_BTHX[b, t, h]
        score_grad_M = scale * share_M * (share_grad_M - share_M @ share_grad_M)
        query_grad_BTHA[b, t, h] = score_grad_M @ key_BMGA[b, seen_M, g]
        key_grad_BMGA[b, seen_M, g] += np.outer(score_grad_M, query_BTHA[b, t, h])
        value_grad_BMGX[b, seen_M, g] += np.outer(share_M, mixed_grad_BTHX[b, t, h])
    return query_grad_BTHA, key_grad_BMGA, value_grad_BMGX


def _queries(query_BTHA, key_BMGA, segments_BM, start_B):
    """Yields every query, the key head that it reads, and the positions that it sees."""
    batch, length, heads, _ = query_BTHA.shape
    for b in range(batch):
        for t in range(length):
            at, segment_M = start_B[b] + t, segments_BM[b]
            seen_M = [m for m in range(at + 1) if segment_M[m] == segment_M[at] or segment_M[m] < 0]
            for h in range(heads):
                yield b, t, h, h * key_BMGA.shape[2] // heads, seen_M


def _softmax(score_M):
    share_M = np.exp(score_M - score_M.max())
    return share_M / share_M.sum()
