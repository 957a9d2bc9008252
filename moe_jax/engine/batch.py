"""Requests as arrays: grouping prompts that are read together, and padding each group to one shape."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.engine import cache as caches
from moe_jax.engine.request import Request
from moe_jax.engine.sampling import Sampling
from moe_jax.engine.steps import Live
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import on_all
from moe_jax.routing import policies

MOST_PADDING = 4  # a prompt joins a group if its bucket is at least 1 / MOST_PADDING of the longest
MOST_TOKENS = 16384  # read at once by one group: bounds the memory of activations


class PaddedPrompts(NamedTuple):
    """Prompts that are read together. Padding rows, which have no request, have length 0."""

    shape: caches.Shape
    tokens_BT: np.ndarray  # int32, padded at the end
    length_B: np.ndarray  # int32
    budget_B: np.ndarray  # int32: tokens that each request may sample
    live: Live


class Grouping(NamedTuple):
    """How requests are read: in groups of prompts of similar length.

    With a single group, its prefix has room for the continuations too and becomes the slots.
    """

    slots: int  # a power of two
    memory: int  # cache positions of each slot
    groups: tuple[tuple[tuple[int, ...], caches.Shape], ...]  # indices of the requests of each group, and its shape


def group_by_length(requests: Sequence[Request], execution: Execution) -> Grouping:
    """Groups requests by length, so that one long prompt does not pad many short ones.

    A prompt joins a group if that adds little padding: its bucket is at least a quarter of the group's, or the whole
    group stays within one chunk of tokens. No group reads more than `MOST_TOKENS` at once.
    """
    lengths = [len(request.ids) for request in requests]
    context = execution.architecture.decoder.max_context
    buckets = [caches.length_bucket(length, context) for length in lengths]
    groups: list[list[int]] = []
    for index in sorted(range(len(requests)), key=lambda index: -lengths[index]):
        if groups:
            longest, rows = buckets[groups[-1][0]], caches.round_up(len(groups[-1]) + 1, execution.data_parts)
            is_similar = MOST_PADDING * buckets[index] >= longest or rows * longest <= caches.CHUNK
            if is_similar and rows * min(longest, caches.CHUNK) <= MOST_TOKENS:
                groups[-1].append(index)
                continue
        groups.append([index])
    whole = _shape_of(requests, execution)
    if len(groups) == 1:
        return Grouping(whole.batch, whole.memory, ((tuple(range(len(requests))), whole),))
    shapes = []
    for group in groups:
        shape = _shape_of([requests[index] for index in group], execution)
        shapes.append(shape._replace(memory=shape.length))
    return Grouping(whole.batch, whole.memory, tuple(zip(map(tuple, map(sorted, groups)), shapes)))


def pad_prompts(requests: Sequence[Request], execution: Execution, shape: caches.Shape | None = None) -> PaddedPrompts:
    """Pads requests to a shape and puts their live settings on the device. None: the smallest shape that holds them."""
    shape = shape or _shape_of(requests, execution)
    tokens_BT = np.zeros((shape.batch, shape.length), np.int32)
    length_B, budget_B = np.zeros((2, shape.batch), np.int32)
    for row, request in enumerate(requests):
        length_B[row], budget_B[row] = len(request.ids), request.max_new_tokens
        tokens_BT[row, : length_B[row]] = request.ids
    return PaddedPrompts(shape, tokens_BT, length_B, budget_B, live_of(requests, shape.batch, execution))


def live_of(requests: Sequence[Request], rows: int, execution: Execution) -> Live:
    """The live settings of `rows` rows, on the device. Padding rows get the settings of the first request."""
    padded = [*requests, *requests[:1] * (rows - len(requests))]
    live = Live(
        policies.settings([request.policy for request in padded], execution.architecture, execution.k_max),
        Sampling(
            np.array([request.sampling.temperature for request in padded], np.float32),
            np.array([request.sampling.top_k for request in padded], np.int32),
            np.array([request.sampling.top_p for request in padded], np.float32),
            np.array([request.seed for request in padded], np.uint32),
        ),
    )
    return jax.device_put(live) if execution.layout is None else on_all(live, execution.layout)


def _shape_of(requests: Sequence[Request], execution: Execution) -> caches.Shape:
    prompts, continuations = zip(*((len(request.ids), request.max_new_tokens) for request in requests))
    return caches.shape_of(prompts, continuations, execution.architecture.decoder.max_context, execution.data_parts)
