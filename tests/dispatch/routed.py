"""Tokens, selections and experts for the tests of dispatch."""

import jax.numpy as jnp
import numpy as np

from moe_jax.dispatch.contract import Experts
from moe_jax.kernels.expert_ffn import reference
from moe_jax.routing.selection import Selection

EXPERTS, K, D, F, LAYERS = 16, 4, 16, 8, 2
LOADS = ("even", "skewed", "empty", "dropped")


def experts(seed=0, d_model=D):
    """Two layers of experts, of which the second is used."""
    random = np.random.default_rng(seed)
    gate_up = random.standard_normal((LAYERS, EXPERTS, 2, F, d_model)).astype(np.float32)
    return Experts(gate_up, random.standard_normal((LAYERS, EXPERTS, d_model, F)).astype(np.float32), jnp.int32(1))


def tokens(num_tokens, d_model=D):
    return np.random.default_rng(7).standard_normal((num_tokens, d_model)).astype(np.float32)


def selection(load, num_tokens):
    """even: all slots kept; skewed: all tokens to expert 5 alone; empty: none; dropped: half of the slots."""
    random = np.random.default_rng(3)
    expert_NK = random.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (num_tokens, 1)), axis=1)[:, :K]
    keep_NK = np.ones((num_tokens, K), bool)
    if load == "skewed":
        expert_NK, keep_NK = expert_NK[:, :], np.zeros_like(keep_NK)
        expert_NK[:, 0], keep_NK[:, 0] = 5, True
    elif load == "empty":
        keep_NK[:] = False
    elif load == "dropped":
        keep_NK = random.random((num_tokens, K)) < 0.5
    weight_NK = np.where(keep_NK, random.random((num_tokens, K)), 0).astype(np.float32)
    return Selection(expert_NK, weight_NK, keep_NK)


def expected(x_ND, selection, experts):
    """y_ND by a loop over the slots, in float64."""
    y_ND = np.zeros(x_ND.shape)
    for token, slot in np.argwhere(selection.keep_NK):
        expert = int(selection.expert_NK[token, slot])
        sizes_E = np.eye(EXPERTS, dtype=np.int32)[expert]
        row = reference.forward(x_ND[token : token + 1], *experts[:2], sizes_E, int(experts.layer))
        y_ND[token] += selection.weight_NK[token, slot] * row[0]
    return y_ND
