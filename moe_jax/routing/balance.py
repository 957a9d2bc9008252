"""Balance of routing in training: the loss of uneven loads, the selection bias, the effective experts of a token."""

import jax
import jax.numpy as jnp

from moe_jax.routing.selection import Routing, Selection


def load_loss(routing: Routing, load_E: jax.Array, valid_N: jax.Array) -> jax.Array:
    """E times the sum over experts of load share times mean score share; 1 if loads are even.

    The loss of Switch Transformer (arXiv 2101.03961, section 2.2) over the valid tokens of a batch, with each token's
    scores normalized to sum to one, as DeepSeek-V3 does for sigmoid scores. Gradients flow through the scores alone.
    """
    share_NE = routing.mix_NE / (routing.mix_NE.sum(axis=1, keepdims=True) + 1e-20)
    valid_N1 = valid_N[:, None].astype(jnp.float32)
    score_share_E = (share_NE * valid_N1).sum(axis=0) / jnp.maximum(valid_N1.sum(), 1.0)
    load_share_E = jax.lax.stop_gradient(load_E / jnp.maximum(load_E.sum(), 1.0))
    return load_E.shape[0] * jnp.sum(score_share_E * load_share_E)


def effective_experts(selection: Selection, valid_N: jax.Array) -> jax.Array:
    """Effective number of experts of a token: 1 if one expert has all the weight, k if k have equal weights.

    The participation ratio (sum w)^2 / sum w^2 of the kept slots' weights, averaged over the valid tokens. Unlike the
    number of kept slots it has a gradient, so a loss can lower it; policies that keep slots by weight (`mass`, `ratio`)
    then keep fewer.
    """
    weight_NK = selection.weight_NK
    squared_N = (weight_NK * weight_NK).sum(axis=1)
    counts_N = valid_N & (squared_N > 0)  # padding has no weights, and 0 / 0 no gradient
    ratio_N = weight_NK.sum(axis=1) ** 2 / jnp.where(counts_N, squared_N, 1.0)
    return jnp.where(counts_N, ratio_N, 0.0).sum() / jnp.maximum(valid_N.sum(), 1)


def update_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """Raises the bias of experts below the mean load by `rate`, and lowers that of experts above it.

    Auxiliary-loss-free balancing (arXiv 2408.15664); the mean over experts is kept at zero, which changes no choice.
    """
    moved_LE = bias_LE + rate * jnp.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
    return moved_LE - moved_LE.mean(axis=1, keepdims=True)
