"""Held-out likelihood of concurrent requests: windows are read together, each position as one decode step.

What a batch-aware policy keeps depends on which rows decode together. Windows are full, so that every step has all its
rows, and shuffled, so that rows are unrelated, like the requests of a server.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.evaluation.scoring import LabeledRows, score
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.selection import distinct_experts


class Windows(NamedTuple):
    """Full windows of held-out documents."""

    tokens_JT: np.ndarray  # int32: T inputs, then the label of the last
    bytes_J: np.ndarray  # int: bytes of the labels' text
    document_J: np.ndarray  # int: index of the document


class ConcurrentScores(NamedTuple):
    """The results of one policy."""

    bits_J: np.ndarray  # float64, of each window
    chosen_LJTK: np.ndarray  # int16: the expert of each slot; -1: not kept


def cut_windows(
    documents: Sequence[np.ndarray],
    tokenizer,
    context: int,
    count: int,
    seed: int,
    settings: tuple[str, str, str] = ("text.held_out", "sweep.windows", "sweep.context"),
) -> Windows:
    """Cuts documents into full windows, end to end, and picks `count` of them at random.

    Args:
        documents: ids of each, as `encode_documents` gives them.
        tokenizer: the model's tokenizer, for the bytes of a window.
        context: T.
        count: the number of windows.
        seed: the seed of the random choice.
        settings: that gave the documents, `count` and `context`, for messages.

    Raises:
        ValueError: there are fewer.
    """
    tokens, sizes, owners = [], [], []
    for number, ids in enumerate(documents):
        ends = range(context, len(ids), context)
        read = [len(tokenizer.decode(ids[: end + 1].tolist()).encode()) for end in (0, *ends)]
        tokens += [ids[end - context : end + 1] for end in ends]
        sizes += np.diff(read).tolist()
        owners += [number] * len(ends)
    if len(tokens) < count:
        text, counted, long = settings
        raise ValueError(
            f"{text} has {len(tokens)} full windows of {context} tokens: expected at least {count}; "
            f"name more text, or lower {counted} or {long}"
        )
    order = np.random.default_rng(seed).permutation(len(tokens))[:count]
    return Windows(*(np.asarray(part)[order] for part in (np.int32(tokens), sizes, owners)))


def score_windows(
    params: decoder.Params,
    windows: Windows,
    policy: policies.Policy,
    execution: decoder.Execution,
    rows: int,
    concurrency: int,
) -> ConcurrentScores:
    """Scores all windows under one policy.

    Args:
        params: as `decoder.split` gives them.
        windows: a multiple of `rows`.
        policy: the policy of every row.
        execution: the static half of the step.
        rows: the rows of a compiled step, which all values of `concurrency` share.
        concurrency: number of successive windows that decode together; a divisor of `rows`.
    """
    live = policies.settings([policy] * rows, execution.architecture, execution.k_max, np.arange(rows) // concurrency)
    bits, chosen = [], []
    for first in range(0, len(windows.tokens_JT), rows):
        tokens_BT = windows.tokens_JT[first : first + rows]
        inputs_BT = tokens_BT[:, :-1]
        source_Y = np.arange(inputs_BT.size, dtype=np.int32)
        positions_BT = np.broadcast_to(np.arange(inputs_BT.shape[1], dtype=np.int32), inputs_BT.shape)
        labels_Y = tokens_BT[:, 1:].reshape(-1)
        batch = LabeledRows(inputs_BT, positions_BT, np.ones_like(inputs_BT), source_Y, labels_Y, len(source_Y))
        [scored] = score(params, batch, [live], execution, side_by_side=True, specs=[policy.spec])
        bits.append(scored.nats_Y.reshape(inputs_BT.shape).sum(axis=1, dtype=np.float64) / np.log(2))
        chosen.append(scored.chosen_LBTK.astype(np.int16))
    return ConcurrentScores(np.concatenate(bits), np.concatenate(chosen, axis=1))


def distinct_at(chosen_LJTK: np.ndarray, concurrency: int) -> float:
    """Distinct experts of a MoE layer in a decode step of `concurrency` rows: mean over layers, steps and groups."""
    layers, windows, length, _ = chosen_LJTK.shape
    by_step = chosen_LJTK.reshape(layers, windows // concurrency, concurrency, length, -1).transpose(0, 1, 3, 2, 4)
    return float(distinct_experts(by_step.reshape(layers * (windows // concurrency) * length, concurrency, -1)).mean())


def steps_of(chosen_LJTK: np.ndarray, concurrency: int, count: int) -> np.ndarray:
    """chosen_SLBK of `count` decode steps of `concurrency` rows, spread evenly over groups of rows and positions."""
    groups, length = chosen_LJTK.shape[1] // concurrency, chosen_LJTK.shape[2]
    place_S = (np.arange(count) + 0.5) / count
    group_S, time_S = np.arange(count) % groups, (place_S * length).astype(int)
    taken = [
        chosen_LJTK[:, group * concurrency : (group + 1) * concurrency, time] for group, time in zip(group_S, time_S)
    ]
    return np.stack(taken)
