"""Held-out likelihood: how many bits per byte a model needs for a text that it has not seen."""

import lzma
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from moe_jax.evaluation.journal import Journal
from moe_jax.evaluation.scoring import LabeledRows, score
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.text.batches import windows

TOKENS = 8192  # most tokens of a step, so that activations take less memory than the model


class Likelihood(NamedTuple):
    """The results of one policy on some documents."""

    bits_J: np.ndarray  # float64
    kl_J: np.ndarray | None  # float64 nats, summed over scored tokens: divergence of the reference from this policy
    tokens_J: np.ndarray  # int64: number of tokens scored
    load_LE: np.ndarray  # int64: slots that each expert received; masked if a layer has fewer experts
    overflow: int  # kept slots that were not computed, of all MoE layers


def score_documents(
    params: decoder.Params,
    documents: Sequence[np.ndarray],
    compared: Sequence[policies.Policy],
    execution: decoder.Execution,
    *,
    context: int,
    batch_size: int,
    reference: int | None = None,
    journal: Journal | None = None,
    progress: str = "",
) -> list[Likelihood]:
    """Scores every token of every document but its leading `<|endoftext|>`.

    A document longer than the context is cut into windows that overlap by a quarter, so that after the first window,
    each token is predicted from at least a quarter of a context.

    Args:
        params: as `decoder.split` gives them.
        documents: int32 ids of each, as `encode_documents` gives them.
        compared: the policies; each batch runs under all of them in turn.
        execution: the static half of the step.
        context: T, tokens of a window.
        batch_size: windows per compiled step; fewer if they would have more than `TOKENS` tokens.
        reference: index of the policy from which divergences are measured; None: no divergences.
        journal: keeps finished batches; None: they are not kept.
        progress: the title of a progress bar, which a terminal shows; "": no bar.

    Returns:
        The likelihood under each policy, in order.

    Raises:
        NotFiniteError: a token's log-probability is NaN or infinite.
    """
    journal = journal or Journal(None, {})
    all_windows = _Windows(documents, context)
    parts = execution.data_parts
    batch_size = parts * max(1, min(batch_size, TOKENS // context) // parts)
    architecture = execution.architecture
    settings = [policies.settings([policy] * batch_size, architecture, execution.k_max) for policy in compared]
    nats_PJ, kl_PJ = np.zeros((2, len(compared), len(documents)))
    num_experts_L = np.array(architecture.num_experts_L)
    load_PLE = np.zeros((len(compared), len(num_experts_L), architecture.moe.num_experts), np.int64)
    overflow_P = np.zeros(len(compared), np.int64)
    starts = range(0, len(all_windows.owner), batch_size)
    for first in tqdm(starts, desc=progress, unit="batch", disable=None if progress else True):
        batch = all_windows.batch(first, batch_size)

        def compute(batch=batch):
            specs = [policy.spec for policy in compared]
            scores = score(params, batch, settings, execution, reference, specs=specs)
            arrays = {"nats_PY": [part.nats_Y for part in scores], "load_PLE": [part.load_LE for part in scores]}
            arrays["overflow_P"] = [part.overflow for part in scores]
            return arrays | ({} if reference is None else {"kl_PY": [part.kl_Y for part in scores]})

        part = journal.once(f"windows-{first:06d}", compute)
        owner_Y = all_windows.owner[first + batch.source_Y[: batch.num_labels] // context]
        for number in range(len(compared)):
            nats_PJ[number] += np.bincount(owner_Y, np.float64(part["nats_PY"][number]), len(documents))
            if reference is not None:
                kl_PJ[number] += np.bincount(owner_Y, np.float64(part["kl_PY"][number]), len(documents))
        load_PLE += part["load_PLE"]
        overflow_P += part["overflow_P"]
    if architecture.moe.num_experts_of_layers:
        missing_LE = np.arange(load_PLE.shape[2]) >= num_experts_L[:, None]
        load_PLE = np.ma.masked_array(load_PLE, np.broadcast_to(missing_LE, load_PLE.shape))
    tokens_J = np.array([max(len(tokens) - 1, 0) for tokens in documents])
    return [
        Likelihood(nats_J / np.log(2), None if reference is None else kl_J, tokens_J, load_LE, overflow)
        for nats_J, kl_J, load_LE, overflow in zip(nats_PJ, kl_PJ, load_PLE, overflow_P.tolist())
    ]


class _Windows:
    """All windows of all documents."""

    def __init__(self, documents: Sequence[np.ndarray], context: int):
        cut = [windows(tokens, context, context - context // 4) for tokens in documents]
        self.owner = np.repeat(np.arange(len(documents)), [len(tokens_NT) for tokens_NT, _, _ in cut])
        self._tokens, self._labels, self._scored = (np.concatenate(parts) for parts in zip(*cut))
        starts = np.concatenate([np.arange(len(tokens_NT)) for tokens_NT, _, _ in cut]) * (context - context // 4)
        self._lengths = np.minimum(context, np.array([len(tokens) - 1 for tokens in documents])[self.owner] - starts)

    def batch(self, first: int, batch_size: int) -> LabeledRows:
        """The `batch_size` windows from `first` on, padded with empty rows at the end."""
        rows = slice(first, first + batch_size)
        missing = first + batch_size - min(first + batch_size, len(self.owner))
        tokens_BT, labels_BT, scored_BT = (
            np.pad(part[rows], ((0, missing), (0, 0))) for part in (self._tokens, self._labels, self._scored)
        )
        context = tokens_BT.shape[1]
        lengths = np.pad(self._lengths[rows], (0, missing))
        source_Y = np.flatnonzero(scored_BT).astype(np.int32)
        padding = (0, scored_BT.size - len(source_Y))
        return LabeledRows(
            tokens_BT,
            np.broadcast_to(np.arange(context, dtype=np.int32), tokens_BT.shape),
            (np.arange(context)[None] < lengths[:, None]).astype(np.int32),
            np.pad(source_Y, padding),
            np.pad(labels_BT.reshape(-1)[source_Y], padding),
            len(source_Y),
        )


def xz_bits_per_byte(texts: Sequence[bytes], primer: Sequence[bytes] = ()) -> float:
    """Bits per byte of `xz -9e` for all texts together: what a general compressor needs.

    Args:
        texts: to compress.
        primer: texts that the compressor reads first, all within its window; their own size does not count.
    """
    read_before = b"".join(primer)
    text = b"".join(texts)
    window = max(1 << 26, 1 << (len(read_before) + len(text)).bit_length())  # -9e has 64 MiB
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(window, 3 << 29)}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, filters=filters)) if data else 0

    return 8 * (size(read_before + text) - size(read_before)) / len(text)
