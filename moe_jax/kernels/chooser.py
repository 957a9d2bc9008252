"""Chooses the implementation of each operation: by name, or for the platform, the device and the model.

A module of an implementation may say where it runs: `PLATFORM`, if on one alone; and `lacks(architecture, dtype)`, the
reason why it cannot run this model here, or ""; and `ONE_DEVICE = True`, if it reads whole arrays only. One of grouped
matmul says in `EIGHT_BITS` in which of `quantized.DTYPES` it takes weights; it may have `lacks_eight_bits(architecture,
dtype)`, such a reason for these.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

from absl import logging

from moe_jax.config.architecture import Architecture
from moe_jax.kernels.cached_attention import api as cached_attention
from moe_jax.kernels.causal_attention import api as causal_attention
from moe_jax.kernels.grouped_matmul import api as grouped_matmul
from moe_jax.kernels.projection import api as projection


class Kernels(NamedTuple):
    """The name of the chosen implementation, for every operation that has several."""

    grouped_matmul: str
    projection: str
    cached_attention: str
    causal_attention: str


OPERATIONS = Kernels(grouped_matmul, projection, cached_attention, causal_attention)._asdict()


def resolve(
    platform: str,
    architecture: Architecture,
    dtype: str,
    asked: Mapping[str, str] | None = None,
    num_devices: int = 1,
    expert_dtype: str = "",
) -> Kernels:
    """Chooses an implementation of every operation.

    "auto" takes the first of the operation's `BY_PLATFORM` that runs here, and says why an earlier one does not.

    Args:
        platform: "cpu", "gpu" or "tpu".
        architecture: of the model.
        dtype: in which the routed experts' products run.
        asked: by operation, the name of an implementation or "auto"; missing operations are "auto".
        num_devices: of the mesh that the model runs on.
        expert_dtype: of the routed experts' weights if they are in eight bits; "": they are not.

    Raises:
        ValueError: an operation or a name is unknown, there is no implementation for the platform, or the named one
            does not run here.
    """
    asked = asked or {}
    if unknown := sorted(asked.keys() - OPERATIONS.keys()):
        raise ValueError(f"kernels.{unknown[0]}: expected one of {', '.join(OPERATIONS)}")

    def lacks(implementation: types.ModuleType) -> str:
        only = getattr(implementation, "PLATFORM", platform)
        if only != platform:
            return f"runs on {only.upper()}s only, not on {platform!r}"
        if num_devices > 1 and getattr(implementation, "ONE_DEVICE", False):
            return f"runs on one device only, not on a mesh of {num_devices}"
        if expert_dtype and implementation in grouped_matmul.IMPLEMENTATIONS.values():
            if expert_dtype not in getattr(implementation, "EIGHT_BITS", ()):
                return f"takes no weights in eight bits ({expert_dtype})"
            if hasattr(implementation, "lacks_eight_bits"):
                reason = implementation.lacks_eight_bits(architecture, expert_dtype)
                if reason:
                    return reason
        return implementation.lacks(architecture, dtype) if hasattr(implementation, "lacks") else ""

    return Kernels(*(_resolve(name, asked.get(name, "auto"), platform, lacks) for name in OPERATIONS))


def _resolve(operation: str, name: str, platform: str, lacks: Callable[[types.ModuleType], str]) -> str:
    api, given = OPERATIONS[operation], f"kernels.{operation} = {name!r}"
    known = ", ".join(api.IMPLEMENTATIONS)
    if name not in ("auto", *api.IMPLEMENTATIONS):
        raise ValueError(f"{given}: expected auto or one of {known}")
    if name == "auto" and platform not in api.BY_PLATFORM:
        raise ValueError(f"{given}: nothing is written for {platform!r}; name one of {known}")
    reasons = {one: lacks(module) for one, module in api.IMPLEMENTATIONS.items()}
    candidates = api.BY_PLATFORM.get(platform, api.BY_PLATFORM["cpu"])
    runs = next(one for one in candidates if not reasons[one])
    if name == "auto":
        for better in candidates[: candidates.index(runs)]:
            _warn(f"kernels.{operation} is {runs!r}, which is slower: {better!r} {reasons[better]}")
        return runs
    if reasons[name]:
        raise ValueError(f"{given}: {reasons[name]}; {runs} would run")
    return name


@functools.cache
def _warn(message: str) -> None:
    """Once for each message: a choice is made for every batch of requests."""
    logging.warning("%s", message)
