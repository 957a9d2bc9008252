"""Held-out bits per byte: how many bits a model needs for each byte of a text that it has not seen."""

import functools
import lzma
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model import decoder
from moe_jax.routing.policies import base as policies
from moe_jax.text.batches import windows

RESAMPLES = 2000


class Likelihood(NamedTuple):
    """What scoring some documents gave."""

    bits: np.ndarray  # float64 per document
    load_LE: np.ndarray  # int64: slots that each expert received


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    ci95: tuple[float, float]


@functools.partial(jax.jit, static_argnames="execution")
def _score(params, tokens_BT, labels_BT, scored_BT, valid_BT, live, execution):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    segments_BT = valid_BT.astype(jnp.int32)
    x_BTD, traffic = decoder.hidden(params, tokens_BT, positions_BT, segments_BT, live, execution)

    def row(carried, args):
        x_TD, labels_T, scored_T = args
        logits_TV = decoder.logits(params, x_TD)
        picked_T = jnp.take_along_axis(logits_TV, labels_T[:, None], axis=1)[:, 0]
        nats_T = jax.nn.logsumexp(logits_TV, axis=1) - picked_T
        return carried, jnp.where(scored_T, nats_T, 0.0).sum()

    _, nats_B = jax.lax.scan(row, None, (x_BTD, labels_BT, scored_BT))
    return nats_B, traffic.load_E


def score(
    params: decoder.Params,
    documents: Sequence[np.ndarray],
    policy: policies.Policy,
    execution: decoder.Execution,
    *,
    context: int,
    batch_size: int,
    advance: Callable[[int], object] = lambda windows: None,
) -> Likelihood:
    """Scores every token of every document but its leading `<|endoftext|>`.

    A document longer than the context is cut into windows that overlap by half: each token but those of the first
    window is predicted from at least half a context.

    Args:
        params: as `decoder.split` gives them.
        documents: int32 ids of each, as `encode_documents` gives them.
        policy: which experts run.
        execution: the static half of the step.
        context: T, tokens of a window.
        batch_size: windows per compiled step.
        advance: called with the number of windows done since the last call, for a progress bar.

    Returns:
        Bits of each document and the experts' loads.
    """
    cut = [windows(tokens, context, context // 2) for tokens in documents]
    owner_N = np.repeat(np.arange(len(documents)), [len(tokens) for tokens, _, _ in cut])
    tokens_NT, labels_NT, scored_NT = (np.concatenate(parts) for parts in zip(*cut))
    length_N = np.concatenate([_lengths(len(tokens), len(parts[0]), context) for tokens, parts in zip(documents, cut)])
    valid_NT = np.arange(context)[None, :] < length_N[:, None]
    moe, num_layers = execution.architecture.moe, execution.architecture.decoder.num_moe_layers
    live = policies.settings([policy] * batch_size, num_layers, moe.k, execution.k_max)
    nats_N = np.zeros(len(owner_N))
    load_LE = np.zeros((num_layers, moe.num_experts), np.int64)
    for first in range(0, len(owner_N), batch_size):
        rows = np.arange(first, first + batch_size)
        there = rows < len(owner_N)
        rows = np.where(there, rows, 0)
        valid_BT, scored_BT = (part[rows] & there[:, None] for part in (valid_NT, scored_NT))
        nats_B, batch_load_LE = _score(
            params, tokens_NT[rows], labels_NT[rows], scored_BT, valid_BT, live, execution=execution
        )
        nats_N[rows[there]] = np.asarray(nats_B)[there]
        load_LE += np.asarray(batch_load_LE)
        advance(int(there.sum()))
    bits = np.bincount(owner_N, weights=nats_N, minlength=len(documents)) / np.log(2)
    return Likelihood(bits, load_LE)


def _lengths(num_tokens: int, num_windows: int, context: int) -> np.ndarray:
    starts = np.arange(num_windows) * (context // 2)
    return np.minimum(context, num_tokens - 1 - starts)


def bits_per_byte(bits: np.ndarray, sizes: np.ndarray, seed: int = 0) -> Estimate:
    """Bits over bytes of all documents, with an interval from resampling documents.

    Args:
        bits: per document.
        sizes: bytes of each document.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    picked = rng.integers(len(bits), size=(RESAMPLES, len(bits)))
    low, high = np.quantile(bits[picked].sum(axis=1) / sizes[picked].sum(axis=1), [0.025, 0.975])
    return Estimate(float(bits.sum() / sizes.sum()), (float(low), float(high)))


def paired_ratio(bits: np.ndarray, reference_bits: np.ndarray, seed: int = 0) -> Estimate:
    """How much worse than the reference, as a fraction of it: 0.01 is one percent more bits for the same text.

    Documents are resampled in pairs, so the spread between documents cancels.
    """
    rng = np.random.default_rng(seed)
    picked = rng.integers(len(bits), size=(RESAMPLES, len(bits)))
    low, high = np.quantile(bits[picked].sum(axis=1) / reference_bits[picked].sum(axis=1) - 1, [0.025, 0.975])
    return Estimate(float(bits.sum() / reference_bits.sum() - 1), (float(low), float(high)))


def xz_bits_per_byte(texts: Sequence[bytes], primer: Sequence[bytes] = ()) -> float:
    """The same for `xz -9e` of all texts together: what a general compressor needs.

    Args:
        texts: what is compressed.
        primer: texts that the compressor has read before, all within its window; their own size does not count.
    """
    read_before = b"".join(primer)
    text = b"".join(texts)
    window = max(1 << 26, 1 << (len(read_before) + len(text)).bit_length())  # -9e has 64 MiB
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(window, 3 << 29)}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, filters=filters)) if data else 0

    return 8 * (size(read_before + text) - size(read_before)) / len(text)
