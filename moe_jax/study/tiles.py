"""Times the tile sizes that a grouped matmul may have, at a model's shapes, and writes the fastest into the table.

All candidates of a product take turns in every round; a time is the median over rounds. Each token chooses its experts
uniformly at random.
"""

import datetime
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.kernels.grouped_matmul import pallas_gpu, tuned

TUNABLE = {"pallas_gpu": pallas_gpu}
MOST_CALLS = 50
ROUND_S = 0.02  # a candidate's calls in one round, if that many fit


class Operands(NamedTuple):
    """Of one product of `pallas_gpu`; `given` are those of the function of that name."""

    product: str
    tokens: int
    rows_SX: jax.Array
    weights_LEFD: jax.Array
    given: tuple[jax.Array, ...]


class TimedTiles(NamedTuple):
    """One choice of tiles of a product, timed."""

    case: tuned.TileKey
    tokens: int
    tiles: tuple[int, ...]
    microseconds: float


def tune(
    architecture: Architecture, dtype: str, decode: Sequence[int], prefill: Sequence[int], rounds: int, seed: int
) -> Iterator[list[TimedTiles]]:
    """Times products one after the other, each with all candidates, and writes the fastest into `tuned.TABLE`.

    Args:
        architecture: of the model.
        dtype: of rows and weights.
        decode: numbers of tokens; the products of inference are timed.
        prefill: numbers of tokens; the gradients too.
        rounds: for each product.
        seed: of the routing and the numbers.

    Yields:
        The candidates of a product, the fastest first.
    """
    for tokens in sorted({*decode, *prefill}):
        for operands in _operands(architecture, jnp.dtype(dtype), tokens, tokens in prefill, seed):
            candidates = _timed(operands, rounds)
            best = candidates[0]
            today = datetime.date.today().isoformat()
            tuned.write(best.case, best.tiles, best.microseconds, today, jax.__version__)
            yield candidates


def _operands(architecture: Architecture, dtype, tokens: int, gradients: bool, seed: int) -> Iterator[Operands]:
    moe, wide = architecture.moe, architecture.decoder.d_model
    experts, hidden, num_rows = moe.num_experts, moe.expert_hidden, tokens * moe.k
    scores = np.random.default_rng(seed).random((tokens, experts))
    chosen = np.argpartition(scores, moe.k - 1, axis=1)[:, : moe.k]
    sizes_E = jnp.asarray(np.bincount(chosen.ravel(), minlength=experts), jnp.int32)
    layer = jnp.int32(0)

    @functools.cache
    def random(*shape):
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    def operands(product, rows_SX, weights_LEFD):
        return Operands(product, tokens, rows_SX, weights_LEFD, (rows_SX, weights_LEFD, sizes_E, layer))

    yield operands("gated", random(num_rows, wide), random(1, experts, 2, hidden, wide))
    yield operands("forward", random(num_rows, hidden), random(1, experts, wide, hidden))
    if not gradients:
        return
    yield operands("forward", random(num_rows, wide), random(1, experts, 2 * hidden, wide))
    for outputs, inputs in ((2 * hidden, wide), (wide, hidden)):
        rows_SD, out_grad_SF, weights = (
            random(num_rows, inputs),
            random(num_rows, outputs),
            random(1, experts, outputs, inputs),
        )
        yield operands("rows_gradient", out_grad_SF, weights)
        yield Operands("weights_gradient", tokens, rows_SD, weights, (rows_SD, weights, sizes_E, out_grad_SF))


def _timed(operands: Operands, rounds: int) -> list[TimedTiles]:
    product, rows_SX, weights_LEFD = operands.product, operands.rows_SX, operands.weights_LEFD
    case = pallas_gpu.case_of(product, rows_SX, weights_LEFD)
    choices = pallas_gpu.candidates(product, rows_SX.shape[0], weights_LEFD.shape[1])
    function = getattr(pallas_gpu, product)
    programs = [jax.jit(functools.partial(function, tiles=one)).lower(*operands.given).compile() for one in choices]
    once_s = min(_seconds(program, operands.given, 1) for program in programs for _ in range(2))
    calls = max(1, min(MOST_CALLS, int(ROUND_S / once_s)))
    seconds = [[] for _ in programs]
    for first in range(rounds):
        for turn in range(len(programs)):
            number = (first + turn) % len(programs)
            seconds[number].append(_seconds(programs[number], operands.given, calls))
    timed = [
        TimedTiles(case, operands.tokens, tuple(tiles), 1e6 * statistics.median(taken_s))
        for tiles, taken_s in zip(choices, seconds)
    ]
    return sorted(timed, key=lambda one: one.microseconds)


def _seconds(program, given, calls: int) -> float:
    """Of one call; all are queued before any is waited for."""
    began = time.perf_counter()
    for _ in range(calls):
        out = program(*given)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls
