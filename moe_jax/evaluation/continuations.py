"""Log-probabilities of given continuations of given contexts, and whether greedy decoding would write them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.engine.cache import length_bucket, round_up
from moe_jax.evaluation.scoring import LabeledRows, score
from moe_jax.model import decoder
from moe_jax.routing import policies


class Pair(NamedTuple):
    """Token ids of a context and of the continuation that is scored."""

    context_ids: Sequence[int]  # at least one
    continuation_ids: Sequence[int]  # at least one, at most the model's context


class Scored(NamedTuple):
    """The result for one pair."""

    log_probability: float  # nats, sum over the tokens of the continuation
    is_greedy: bool  # whether no other token is likelier, at any of its positions


def require_row_wise(policy: policies.Policy) -> None:
    """Refuses a policy whose choice for one request depends on the other requests of the batch.

    A continuation is read as a whole, batched by length with others: there is no decode step for such a policy to act
    on, so its results would have no meaning.

    Raises:
        ValueError: the policy is batch-aware.
    """
    if policy.batch_aware:
        raise ValueError(
            f"policy {policy.spec!r} looks at the rows of one decode step: expected a row-wise policy, such as "
            '"topk:4", where the likelihood of given text is asked for'
        )


def num_truncated(pairs: Sequence[Pair], max_context: int) -> int:
    """The number of pairs that are too long, whose contexts `score_continuations` truncates at the beginning."""
    return sum(len(pair.context_ids) + len(pair.continuation_ids) > max_context + 1 for pair in pairs)


def score_continuations(
    params: decoder.Params,
    pairs: Sequence[Pair],
    policy: policies.Policy,
    execution: decoder.Execution,
    *,
    batch_size: int,
    on_scored: Callable[[int, Scored], object] = lambda index, scored: None,
) -> list[Scored]:
    """Scores each continuation of its context; contexts that are too long are truncated at the beginning.

    The longest pairs go first, in batches of a fixed number of rows and bucketed lengths: few programs are compiled,
    and a batch that does not fit in memory fails at once. Pairs for which the model reads the same tokens share a row,
    such as the answers "A" to "D" to one question.

    Args:
        params: as `decoder.split` gives them.
        pairs: to score.
        policy: which experts run; row-wise.
        execution: the static half of the step.
        batch_size: rows per compiled step.
        on_scored: called with the index of a pair and its result, as soon as that is known.

    Returns:
        A result for each pair, in order.

    Raises:
        ValueError: a pair has no context or no continuation, or one longer than the model's context; the policy is not
            row-wise or does not fit the model.
    """
    require_row_wise(policy)
    max_context = execution.architecture.decoder.max_context
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        sharing.setdefault(_tokens_read(index, pair, max_context), []).append(index)
    longest_first = sorted(sharing, key=len, reverse=True)
    rows = min(batch_size, round_up(max(len(longest_first), 1)))
    live = settings_of(policy, rows, execution)
    results = [Scored(0.0, True)] * len(pairs)
    for first in range(0, len(longest_first), rows):
        read = longest_first[first : first + rows]
        asked = [index for ids in read for index in sharing[ids]]
        row_of = [row for row, ids in enumerate(read) for _ in sharing[ids]]
        rows_asked = _lay_out(read, row_of, [pairs[index].continuation_ids for index in asked], rows, max_context)
        [scores] = score(params, rows_asked.batch, [live], execution, greedy=True, specs=[policy.spec])
        nats = np.bincount(rows_asked.asked_Y, np.float64(scores.nats_Y), len(asked))
        misses = np.bincount(rows_asked.asked_Y, ~scores.greedy_Y, len(asked))
        for number, index in enumerate(asked):
            results[index] = Scored(-float(nats[number]), not misses[number])
            on_scored(index, results[index])
    return results


def _tokens_read(index: int, pair: Pair, max_context: int) -> tuple[int, ...]:
    """The tokens that the model reads to score a pair: all but the last, truncated to the model's context."""
    count = len(pair.continuation_ids)
    if not len(pair.context_ids) or not count:
        empty = "continuation" if len(pair.context_ids) else "context"
        raise ValueError(f"request {index + 1} has no tokens in its {empty}: expected at least one")
    if count > max_context:
        raise ValueError(
            f"request {index + 1} has a continuation of {count} tokens: expected at most the model's context, "
            f"{max_context}"
        )
    return (*pair.context_ids, *pair.continuation_ids)[-(max_context + 1) :][:-1]


def settings_of(policy: policies.Policy, rows: int, execution: decoder.Execution) -> policies.Settings:
    """The settings of one policy for `rows` rows; ValueError if it does not fit the model."""
    return policies.settings([policy] * rows, execution.architecture, execution.k_max)


class _ContinuationRows(NamedTuple):
    batch: LabeledRows
    asked_Y: np.ndarray  # the continuation of each label


def _lay_out(read, row_of, continuations, rows: int, max_context: int) -> _ContinuationRows:
    """Pads rows to a bucketed length, with empty rows at the end; each continuation ends its row."""
    length = length_bucket(max(map(len, read)), max_context)
    tokens_BT, segments_BT = np.zeros((2, rows, length), np.int32)
    for row, ids in enumerate(read):
        tokens_BT[row, : len(ids)] = ids
        segments_BT[row, : len(ids)] = 1
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
    ends = [row * length + len(read[row]) for row in row_of]
    source = [end - len(ids) + place for end, ids in zip(ends, continuations) for place in range(len(ids))]
    label = [token for ids in continuations for token in ids]
    padding = (0, round_up(max(tokens_BT.size, len(label))) - len(label))
    source_Y, label_Y = (np.pad(np.array(part, np.int32), padding) for part in (source, label))
    asked_Y = np.repeat(np.arange(len(continuations)), [len(ids) for ids in continuations])
    return _ContinuationRows(LabeledRows(tokens_BT, positions_BT, segments_BT, source_Y, label_Y, len(label)), asked_Y)
