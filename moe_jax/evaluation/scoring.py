"""Scores labels at positions of token rows: the compiled step that all likelihood evaluations share."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.model import decoder
from moe_jax.model.finite import require_finite
from moe_jax.model.sharding import constrained, on_all, whole
from moe_jax.routing import policies

CHUNK = 1024  # labels whose logits are in memory at a time


class LabeledRows(NamedTuple):
    """Token rows, and the labels to score after which of their positions."""

    tokens_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32
    segments_BT: np.ndarray  # int32, as `decoder.hidden` takes them
    source_Y: np.ndarray  # int32: position b * T + t that predicts each label
    label_Y: np.ndarray  # int32
    num_labels: int  # only the first `num_labels` are scored; the rest is padding and costs nothing


class Scores(NamedTuple):
    """The results of one policy on a batch."""

    nats_Y: np.ndarray  # float32: -log p of each scored label
    load_LE: np.ndarray  # int32: slots that each expert received
    chosen_LBTK: np.ndarray  # int32: the expert of each slot; -1: not kept
    overflow: int  # kept slots that were not computed, of all MoE layers
    kl_Y: np.ndarray | None = None  # float32 nats: divergence of the reference's next-token distribution from this one
    greedy_Y: np.ndarray | None = None  # bool: whether no other token is likelier


@functools.partial(jax.jit, static_argnames=("execution", "side_by_side", "prefixes"))
def _hidden(params, tokens_BT, positions_BT, segments_BT, live, execution, side_by_side, prefixes):
    rows = (tokens_BT, positions_BT, segments_BT)
    settings = {"side_by_side": side_by_side, "in_stacks": True, "prefixes": prefixes}
    x_BTD, use = decoder.hidden(params, *rows, live, execution, **settings)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    counted = whole((use.load_E, use.chosen_NK, use.overflow.sum()), execution.layout)
    return constrained(x_ND, "ND", execution.layout), *counted


@functools.partial(jax.jit, static_argnames=("layout", "greedy"))
def _score_labels(params, x_ND, reference_ND, source_Y, label_Y, num_labels, *, layout, greedy):
    """The requested fields of `Scores` with one value per label, computed chunk by chunk."""
    size = min(CHUNK, len(label_Y))

    def log_probability(x_ND, source):
        return jax.nn.log_softmax(decoder.logits(params, x_ND[source]), axis=1)

    def score_chunk(number, done):
        first = jnp.minimum(number * size, len(label_Y) - size)
        source, label = (lax.dynamic_slice_in_dim(part, first, size) for part in (source_Y, label_Y))
        log_YV = log_probability(x_ND, source)
        own_Y = jnp.take_along_axis(log_YV, label[:, None], axis=1)[:, 0]
        new = {"nats_Y": -own_Y}
        if greedy:
            new["greedy_Y"] = own_Y >= log_YV.max(axis=1)  # on a CPU an argmax takes as long as the logits themselves
        if reference_ND is not None:
            reference_YV = log_probability(reference_ND, source)
            new["kl_Y"] = (jnp.exp(reference_YV) * (reference_YV - log_YV)).sum(axis=1)
        return {name: lax.dynamic_update_slice_in_dim(all_Y, new[name], first, 0) for name, all_Y in done.items()}

    zeros = {"nats_Y": jnp.zeros(len(label_Y), jnp.float32)}
    if greedy:
        zeros["greedy_Y"] = jnp.zeros(len(label_Y), bool)
    if reference_ND is not None:
        zeros["kl_Y"] = jnp.zeros(len(label_Y), jnp.float32)
    return whole(lax.fori_loop(0, (num_labels + size - 1) // size, score_chunk, zeros), layout)


def score(
    params: decoder.Params,
    batch: LabeledRows,
    settings: Sequence[policies.Settings],
    execution: decoder.Execution,
    reference: int | None = None,
    side_by_side: bool = False,
    greedy: bool = False,
    specs: Sequence[str] = (),
) -> list[Scores]:
    """Scores one batch under several policies, each with as many static slots as it keeps experts.

    Args:
        params: as `decoder.split` gives them.
        batch: the rows and their labels.
        settings: the settings of each policy, one row for each row of the batch.
        execution: the static half of the steps.
        reference: index of the policy from which divergences are measured; None: no divergences.
        side_by_side: as `decoder.hidden` takes it.
        greedy: whether to return `greedy_Y`.
        specs: the specs of the policies, for messages.

    Raises:
        NotFiniteError: the log-probability of a label is NaN or infinite.
    """
    layout = execution.layout
    rows = on_all((batch.tokens_BT, batch.positions_BT, batch.segments_BT), layout)
    labels = on_all((batch.source_Y, batch.label_Y, batch.num_labels), layout)

    prefixes = bool((batch.segments_BT < 0).any())

    def hidden(live):
        kept = dataclasses.replace(execution, k_max=int(np.max(live.columns_BL["k"])))
        given = on_all(live, layout)
        return _hidden(params, *rows, given, execution=kept, side_by_side=side_by_side, prefixes=prefixes)

    from_reference = None if reference is None else hidden(settings[reference])
    reference_ND = None if reference is None else from_reference[0]
    scores = []
    for number, live in enumerate(settings):
        x_ND, load_LE, chosen_LNK, overflow = from_reference if number == reference else hidden(live)
        scored = _score_labels(params, x_ND, reference_ND, *labels, layout=layout, greedy=greedy)
        scored = {name: np.asarray(part)[: batch.num_labels] for name, part in scored.items()}
        named = f", {specs[number]!r}" if specs else ""
        require_finite(scored["nats_Y"], f"the log-probabilities of a text{named}", params)
        chosen_LBTK = np.asarray(chosen_LNK).reshape(len(chosen_LNK), *batch.tokens_BT.shape, -1)
        counted = {"load_LE": np.asarray(load_LE), "chosen_LBTK": chosen_LBTK, "overflow": int(overflow)}
        scores.append(Scores(**counted, **scored))
    return scores
