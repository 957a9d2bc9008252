"""Many policies on the same text in one compiled step: the likelihood of each, and its divergence from the first."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.evaluation.scoring import CHUNK
from moe_jax.model import decoder
from moe_jax.model.finite import require_finite
from moe_jax.routing import policies


class Together(NamedTuple):
    """The results of P policies on J texts, summed over positions."""

    nats_JP: np.ndarray  # float64: -log p of the labels
    kl_JP: np.ndarray  # float64 nats: divergence of the first policy's next-token distributions from each policy's


@functools.partial(jax.jit, static_argnames="execution")
def _together(params, tokens_T, label_T, live, execution):
    rows, length = len(live.group_B), len(tokens_T)
    tokens_BT = jnp.broadcast_to(tokens_T, (rows, length))
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens_BT.shape)
    given = (tokens_BT, positions_BT, jnp.ones_like(positions_BT))
    x_BTD, _ = decoder.hidden(params, *given, live, execution, in_stacks=True, prefixes=False)

    def of_chunk(chunk):
        x_TBD, label_T = chunk
        logits_TBV = decoder.logits(params, x_TBD)
        norm_TB = jax.nn.logsumexp(logits_TBV, axis=2)
        own_TB = jnp.take_along_axis(logits_TBV, label_T[:, None, None], axis=2)[:, :, 0]
        first_TV = jax.nn.softmax(logits_TBV[:, 0], axis=1)
        apart_TB = (first_TV[:, None] * (logits_TBV[:, :1] - logits_TBV)).sum(axis=2)
        return (norm_TB - own_TB).sum(axis=0), (apart_TB + norm_TB - norm_TB[:, :1]).sum(axis=0)

    size = next(size for size in range(min(length, max(1, CHUNK // rows)), 0, -1) if length % size == 0)
    x_TBD = x_BTD.transpose(1, 0, 2).reshape(-1, size, rows, x_BTD.shape[2])
    nats_B, kl_B = lax.map(of_chunk, (x_TBD, label_T.reshape(-1, size)))
    return nats_B.sum(axis=0), kl_B.sum(axis=0)


def score_together(
    params: decoder.Params, tokens_JT: np.ndarray, live: policies.Settings, execution: decoder.Execution
) -> Together:
    """Scores texts under P policies, one text at a time, each row of the batch under its own policy.

    All policies run in one program, and the distributions of the first are computed once for all.

    Args:
        params: as `decoder.split` gives them.
        tokens_JT: int32 rows without padding: inputs, and the label of the last.
        live: the settings of the P policies, one row each.
        execution: the static half of the step, on one device.

    Raises:
        NotFiniteError: a result is NaN or infinite.
    """
    scored = [_together(params, tokens_T[:-1], tokens_T[1:], live, execution) for tokens_T in tokens_JT]
    together = Together(*(np.stack(jax.device_get(part)).astype(np.float64) for part in zip(*scored)))
    require_finite(np.concatenate(together), "the log-probabilities of a text", params)
    return together
