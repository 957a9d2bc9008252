"""Scores labels behind positions of token rows: the one compiled step of all that asks a model how likely a text is."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.model import decoder
from moe_jax.routing.policies import base as policies

CHUNK = 1024  # labels whose logits exist at a time


class Batch(NamedTuple):
    """Token rows, and which labels are scored behind which of their positions."""

    tokens_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32
    segments_BT: np.ndarray  # int32, as `decoder.hidden` takes them
    source_Y: np.ndarray  # int32: position b * T + t that predicts each label
    label_Y: np.ndarray  # int32
    num_labels: int  # only the first so many are scored; the rest is padding and costs nothing


class Scores(NamedTuple):
    """What one policy says of a batch."""

    nats_Y: np.ndarray  # float32: of each scored label
    greedy_Y: np.ndarray  # bool: no other token is likelier
    kl_Y: np.ndarray | None  # float32 nats: of the reference's next-token distribution from this one
    load_LE: np.ndarray  # int32: slots that each expert received


@functools.partial(jax.jit, static_argnames="execution")
def _hidden(params, tokens_BT, positions_BT, segments_BT, live, execution):
    x_BTD, traffic = decoder.hidden(params, tokens_BT, positions_BT, segments_BT, live, execution)
    return x_BTD.reshape(-1, x_BTD.shape[-1]), traffic.load_E


@jax.jit
def _nats(params, x_ND, reference_ND, source_Y, label_Y, num_labels):
    """Nats of each label, whether it is the likeliest and, where there is a reference, the divergence from it.

    Chunk by chunk, as many as needed.
    """
    size = min(CHUNK, len(label_Y))

    def log_probability(x_ND, source):
        return jax.nn.log_softmax(decoder.logits(params, x_ND[source]), axis=1)

    def of_chunk(number, done):
        first = jnp.minimum(number * size, len(label_Y) - size)
        source, label = (lax.dynamic_slice_in_dim(part, first, size) for part in (source_Y, label_Y))
        log_YV = log_probability(x_ND, source)
        own_Y = jnp.take_along_axis(log_YV, label[:, None], axis=1)[:, 0]
        new = [-own_Y, own_Y >= log_YV.max(axis=1)]  # an argmax takes as long as the logits themselves on a CPU
        if reference_ND is not None:
            reference_YV = log_probability(reference_ND, source)
            new.append((jnp.exp(reference_YV) * (reference_YV - log_YV)).sum(axis=1))
        return [lax.dynamic_update_slice_in_dim(all_Y, part, first, 0) for all_Y, part in zip(done, new)]

    dtypes = [jnp.float32, bool] + ([] if reference_ND is None else [jnp.float32])
    nothing = [jnp.zeros(len(label_Y), dtype) for dtype in dtypes]
    return lax.fori_loop(0, (num_labels + size - 1) // size, of_chunk, nothing)


def score(
    params: decoder.Params,
    batch: Batch,
    settings: Sequence[policies.Settings],
    execution: decoder.Execution,
    reference: int | None = None,
) -> list[Scores]:
    """Scores one batch under several policies, each with as many static slots as it keeps.

    Args:
        params: as `decoder.split` gives them.
        batch: the rows and their labels.
        settings: of each policy, one row for each row of the batch.
        execution: the static half of the steps.
        reference: which of them divergences are measured from; None: no divergences.
    """
    rows = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    labels = (batch.source_Y, batch.label_Y, batch.num_labels)

    def hidden(live):
        kept = dataclasses.replace(execution, k_max=int(np.max(live.k_BL)))
        return _hidden(params, *rows, live, execution=kept)

    from_reference = None if reference is None else hidden(settings[reference])
    scores = []
    for number, live in enumerate(settings):
        x_ND, load_LE = from_reference if number == reference else hidden(live)
        found = _nats(params, x_ND, None if reference is None else from_reference[0], *labels)
        nats_Y, greedy_Y, kl_Y = (*(np.asarray(part)[: batch.num_labels] for part in found), None)[:3]
        scores.append(Scores(nats_Y, greedy_Y, kl_Y, np.asarray(load_LE)))
    return scores
