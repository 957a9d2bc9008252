"""What training minimises: next-token cross-entropy, in chunks that never hold all logits, and the load loss."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.model import decoder
from moe_jax.routing.policies.base import Settings

CHUNK_TOKENS = 1024  # rows of logits held at once, or a little more where they do not divide the batch


class Measured(NamedTuple):
    """What one batch measured."""

    loss: jax.Array  # mean cross-entropy of the scored tokens, nats
    load_loss: jax.Array  # mean over MoE layers
    load_LE: jax.Array  # slots that each expert received


def _chunk(x_ND: jax.Array, head_VD: jax.Array, labels_N: jax.Array, weight_N: jax.Array):
    """Weighted cross-entropy of one chunk, and its gradient for the logits."""
    logits_NV = jnp.dot(x_ND, head_VD.T, preferred_element_type=jnp.float32)
    top_N1 = logits_NV.max(axis=1, keepdims=True)
    exp_NV = jnp.exp(logits_NV - top_N1)
    sum_N1 = exp_NV.sum(axis=1, keepdims=True)
    picked_N1 = jnp.take_along_axis(logits_NV, labels_N[:, None], axis=1)
    loss = ((jnp.log(sum_N1) + top_N1 - picked_N1)[:, 0] * weight_N).sum()
    is_label_NV = jnp.arange(logits_NV.shape[1])[None, :] == labels_N[:, None]
    return loss, (exp_NV / sum_N1 - is_label_NV) * weight_N[:, None]


@jax.custom_vjp
def cross_entropy(x_ND: jax.Array, head_VD: jax.Array, labels_N: jax.Array, weight_N: jax.Array) -> jax.Array:
    """Sum over tokens of weight times cross-entropy, in nats.

    Computes the gradients along with the loss, chunk by chunk, so that the logits are made once and never kept.

    Args:
        x_ND: what the output head reads.
        head_VD: the output projection.
        labels_N: int32 ids.
        weight_N: float32; 0 where a token is not scored.

    Returns:
        float32 scalar.
    """
    return _cross_entropy_forward(x_ND, head_VD, labels_N, weight_N)[0]


def _cross_entropy_forward(x_ND, head_VD, labels_N, weight_N):
    num_tokens = x_ND.shape[0]
    most = max(1, num_tokens // CHUNK_TOKENS)
    chunks = next(count for count in range(most, 0, -1) if num_tokens % count == 0)
    split = functools.partial(jax.tree.map, lambda a: a.reshape(chunks, -1, *a.shape[1:]))

    def step(carried, chunk):
        loss, head_grad_VD = carried
        x, labels, weight = chunk
        chunk_loss, logits_grad = _chunk(x, head_VD, labels, weight)
        head_grad_VD = head_grad_VD + jnp.dot(logits_grad.T, x, preferred_element_type=jnp.float32)
        return (loss + chunk_loss, head_grad_VD), jnp.dot(logits_grad, head_VD).astype(x.dtype)

    start = jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32)
    (loss, head_grad_VD), x_grad = lax.scan(step, start, split((x_ND, labels_N, weight_N)))
    return loss, (x_grad.reshape(x_ND.shape), head_grad_VD.astype(head_VD.dtype))


def _cross_entropy_backward(gradients, scale):
    x_grad_ND, head_grad_VD = gradients
    return x_grad_ND * scale, head_grad_VD * scale, None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def objective(
    params: decoder.Params,
    batch: dict[str, jax.Array],
    live: Settings,
    execution: decoder.Execution,
    balance_loss: float,
) -> tuple[jax.Array, Measured]:
    """Mean cross-entropy of a packed batch plus `balance_loss` times the mean load loss.

    Args:
        params: as `decoder.split` gives them.
        batch: `tokens_BT`, `labels_BT`, `segments_BT` (0: padding, not scored) and `positions_BT`, int32.
        live: settings of the policy.
        execution: the static half of the step.
        balance_loss: coefficient of the load loss.

    Returns:
        What to minimise, and what was measured.
    """
    segments_BT = batch["segments_BT"]
    x_BTD, traffic = decoder.hidden(params, batch["tokens_BT"], batch["positions_BT"], segments_BT, live, execution)
    scored_N = (segments_BT > 0).reshape(-1).astype(jnp.float32)
    weight_N = scored_N / jnp.maximum(scored_N.sum(), 1.0)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    loss = cross_entropy(x_ND, decoder.head(params), batch["labels_BT"].reshape(-1), weight_N)
    load_loss = traffic.load_loss.mean()
    return loss + balance_loss * load_loss, Measured(loss, load_loss, traffic.load_E)
