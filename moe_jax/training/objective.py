"""What training minimises: next-token cross-entropy, distance from a teacher, uneven expert load, experts used.

The terms that need logits are computed in chunks of tokens, together with their gradients, so that the logits of a
whole batch are never in memory.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.model import decoder
from moe_jax.routing.policies import Settings

CHUNK_TOKENS = 1024  # rows of logits in memory, or more if this does not divide the batch


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "live"), meta_fields=("execution",))
@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen model that the student is compared with, its policy settings, and how it runs.

    It may have another shape than the student, but has the same vocabulary.
    """

    params: decoder.Params
    live: Settings
    execution: decoder.Execution


class BatchMetrics(NamedTuple):
    """What was measured on one batch."""

    terms: dict[str, jax.Array]  # float32 scalars before weighting; "loss" is the cross-entropy in nats
    load_LE: jax.Array  # slots that each expert received
    overflow: jax.Array  # kept slots that were not computed, of all MoE layers


def _softmax(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and probabilities, with one exponential per logit."""
    logits_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
    exp_NV = jnp.exp(logits_NV)
    sum_N1 = exp_NV.sum(axis=1, keepdims=True)
    return logits_NV - jnp.log(sum_N1), exp_NV / sum_N1


def _cross_entropy(log_NV: jax.Array, share_NV: jax.Array, labels_N: jax.Array):
    """Cross-entropy of each token, and its gradient with respect to the logits."""
    is_label_NV = jnp.arange(log_NV.shape[1])[None, :] == labels_N[:, None]
    return -jnp.take_along_axis(log_NV, labels_N[:, None], axis=1)[:, 0], share_NV - is_label_NV


def _divergence(log_NV: jax.Array, share_NV: jax.Array, teacher_NV: jax.Array, direction: str):
    """KL divergence of each token, and its gradient with respect to the student's logits over the temperature.

    With teacher p and student q, "forward" is sum p log(p / q) and "reverse" is sum q log(q / p).
    """
    teacher_log_NV, teacher_share_NV = _softmax(teacher_NV)
    if direction == "forward":
        kl_N = (teacher_share_NV * (teacher_log_NV - log_NV)).sum(axis=1)
        return kl_N, share_NV - teacher_share_NV
    kl_N = (share_NV * (log_NV - teacher_log_NV)).sum(axis=1)
    return kl_N, share_NV * (log_NV - teacher_log_NV - kl_N[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def token_losses(
    x_ND: jax.Array,
    head_VD: jax.Array,
    labels_N: jax.Array,
    weight_N: jax.Array,
    teacher_ND: jax.Array | None,
    teacher_head_VD: jax.Array | None,
    config: ObjectiveConfig,
    parts: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum, over tokens, of the terms that need logits.

    Computes the gradients along with the losses, chunk by chunk: logits are computed once and not stored.

    Args:
        x_ND: input of the output head.
        head_VD: the output projection.
        labels_N: int32 ids.
        weight_N: float32; 0 if a token is not scored.
        teacher_ND: input of the teacher's output head, or None without a teacher. No gradient flows to it.
        teacher_head_VD: the teacher's output projection.
        config: the weight of each term, static.
        parts: of the mesh's data axis, static: each chunk has tokens of all parts.

    Returns:
        float32 scalar, the weighted sum, which is differentiated; and the terms before weighting, which are not.
    """
    return _forward(x_ND, head_VD, labels_N, weight_N, teacher_ND, teacher_head_VD, config, parts)[0]


def _forward(x_ND, head_VD, labels_N, weight_N, teacher_ND, teacher_head_VD, config, parts):
    num_tokens = x_ND.shape[0]
    most = max(1, num_tokens // CHUNK_TOKENS)
    chunks = next(count for count in range(most, 0, -1) if num_tokens % (count * parts) == 0)

    def in_chunks(a):
        by_part = a.reshape(parts, chunks, -1, *a.shape[1:]).swapaxes(0, 1)
        return by_part.reshape(chunks, -1, *a.shape[1:])

    def joined(a):
        by_part = a.reshape(chunks, parts, -1, *a.shape[2:]).swapaxes(0, 1)
        return by_part.reshape(num_tokens, *a.shape[2:])

    split = functools.partial(jax.tree.map, in_chunks)

    def chunk_terms(x_ND, labels_N, weight_N, teacher_ND):
        logits_NV = jnp.dot(x_ND, head_VD.T, preferred_element_type=jnp.float32)
        log_NV, share_NV = _softmax(logits_NV)
        loss_N, gradient_NV = _cross_entropy(log_NV, share_NV, labels_N)
        terms, gradient_NV = {"loss": (loss_N * weight_N).sum()}, config.language_model * gradient_NV
        if teacher_ND is not None:
            teacher_NV = jnp.dot(teacher_ND, teacher_head_VD.T, preferred_element_type=jnp.float32)
            temperature = config.temperature
            if temperature != 1:
                log_NV, share_NV = _softmax(logits_NV / temperature)
            kl_N, kl_gradient_NV = _divergence(log_NV, share_NV, teacher_NV / temperature, config.direction)
            # times the temperature squared, so that gradients keep their size (arXiv 1503.02531, section 2)
            terms["divergence"] = temperature**2 * (kl_N * weight_N).sum()
            gradient_NV = gradient_NV + config.distillation * temperature * kl_gradient_NV
        return terms, gradient_NV * weight_N[:, None]

    def step(carried, chunk):
        terms, head_grad_VD = carried
        new, logits_grad = chunk_terms(*chunk)
        x = chunk[0]
        head_grad_VD = head_grad_VD + jnp.dot(logits_grad.T, x, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, terms, new), head_grad_VD), jnp.dot(logits_grad, head_VD).astype(x.dtype)

    zeros = {"loss": jnp.float32(0)} | ({} if teacher_ND is None else {"divergence": jnp.float32(0)})
    start = zeros, jnp.zeros(head_VD.shape, jnp.float32)
    (terms, head_grad_VD), x_grad = lax.scan(step, start, split((x_ND, labels_N, weight_N, teacher_ND)))
    total = config.language_model * terms["loss"] + config.distillation * terms.get("divergence", 0.0)
    return (total, terms), (joined(x_grad), head_grad_VD.astype(head_VD.dtype))


def _backward(config, parts, gradients, scales):
    scale, _ = scales  # the terms themselves are only reported
    x_grad_ND, head_grad_VD = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return x_grad_ND, head_grad_VD, None, None, None, None


token_losses.defvjp(_forward, _backward)


def objective(
    params: decoder.Params,
    batch: dict[str, jax.Array],
    live: Settings,
    execution: decoder.Execution,
    config: ObjectiveConfig,
    balance_loss: float,
    teacher: Teacher | None = None,
    remat: bool = False,
) -> tuple[jax.Array, BatchMetrics]:
    """The weighted sum of all terms on a packed batch, averaged over its scored tokens.

    Args:
        params: from `decoder.split`.
        batch: `tokens_BT`, `labels_BT`, `segments_BT` (0: padding, not scored) and `positions_BT`, int32.
        live: settings of the policy.
        execution: the static half of the step.
        config: the weight of each term.
        balance_loss: the weight of the load loss.
        teacher: the full model, or None.
        remat: passed to `decoder.hidden`.

    Returns:
        The scalar to minimise, and what was measured.
    """
    rows, layout = (batch["tokens_BT"], batch["positions_BT"], batch["segments_BT"]), execution.layout
    x_BTD, use = decoder.hidden(params, *rows, live, execution, remat=remat, prefixes=False)
    scored_N = (batch["segments_BT"] > 0).reshape(-1).astype(jnp.float32)
    weight_N = scored_N / jnp.maximum(scored_N.sum(), 1.0)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    teacher_ND = teacher_head_VD = None
    if teacher is not None:
        with jax.named_scope("teacher"):
            teacher_BTD, _ = decoder.hidden(teacher.params, *rows, teacher.live, teacher.execution, prefixes=False)
        teacher_ND = lax.stop_gradient(teacher_BTD.reshape(-1, teacher_BTD.shape[-1]))
        teacher_head_VD = lax.stop_gradient(decoder.head(teacher.params, teacher.execution.layout))
    unlike = teacher is None or teacher_ND.shape != x_ND.shape  # then `objective.hidden` is 0
    labels_N = batch["labels_BT"].reshape(-1)
    heads = decoder.head(params, layout), teacher_head_VD
    total, terms = token_losses(x_ND, heads[0], labels_N, weight_N, teacher_ND, heads[1], config, execution.data_parts)
    layer_terms = {
        "hidden_distance": (config.hidden, None if unlike else _distance(x_ND, teacher_ND, weight_N)),
        "load_loss": (balance_loss, use.load_loss.mean()),
        "effective_experts": (config.sparsity, use.effective_experts.mean()),
    }
    for name, (weight, value) in layer_terms.items():
        if value is not None:
            terms[name] = value
            total = total + weight * value if weight else total
    return total, BatchMetrics(terms, use.load_E, use.overflow.sum())


def _distance(x_ND: jax.Array, teacher_ND: jax.Array, weight_N: jax.Array) -> jax.Array:
    """Squared distance between the inputs of the two output heads, over the squared length of the teacher's."""
    x_ND, teacher_ND = x_ND.astype(jnp.float32), teacher_ND.astype(jnp.float32)
    apart_N = ((x_ND - teacher_ND) ** 2).sum(axis=1) / jnp.maximum((teacher_ND**2).sum(axis=1), 1e-20)
    return (apart_N * weight_N).sum()
