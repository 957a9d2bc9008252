"""Chooses the implementation of each operation: by name, or for the platform."""

from collections.abc import Mapping
from typing import NamedTuple

from absl import logging

from moe_jax.kernels import compiled
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
NATIVE = "native"  # C++
_ONLY_ON = {NATIVE: "cpu", "pallas_gpu": "gpu", "pallas_tpu": "tpu"}
_STAND_INS = {"padded": "on a Hopper GPU, with weights in 16 bits, 'pallas_gpu' moves a third of the bytes"}


def resolve(platform: str, asked: Mapping[str, str] | None = None) -> Kernels:
    """Chooses an implementation of every operation.

    "auto" takes the operation's `BY_PLATFORM`; on a CPU without a C++ compiler its `WITHOUT_COMPILER`, with a warning.

    Args:
        platform: "cpu", "gpu" or "tpu".
        asked: by operation, the name of an implementation or "auto"; missing operations are "auto".

    Raises:
        ValueError: an operation or a name is unknown, there is no implementation for the platform, or the named one
            does not run here.
    """
    asked = asked or {}
    if unknown := sorted(asked.keys() - OPERATIONS.keys()):
        raise ValueError(f"kernels.{unknown[0]}: expected one of {', '.join(OPERATIONS)}")
    return Kernels(*(_resolve(name, asked.get(name, "auto"), platform) for name in OPERATIONS))


def _resolve(operation: str, name: str, platform: str) -> str:
    api, given = OPERATIONS[operation], f"kernels.{operation} = {name!r}"
    if name == "auto":
        if platform not in api.BY_PLATFORM:
            raise ValueError(
                f"{given}: nothing is written for {platform!r}; name one of {', '.join(api.IMPLEMENTATIONS)}"
            )
        name = api.BY_PLATFORM[platform]
        if name == NATIVE and compiled.compiler() is None:
            logging.log_first_n(logging.WARNING, "no C++ compiler (c++) on PATH: kernels are plain JAX, and slower", 1)
            name = api.WITHOUT_COMPILER
        if name in _STAND_INS:
            logging.log_first_n(logging.WARNING, "kernels.%s is %r: %s", 1, operation, name, _STAND_INS[name])
        return name
    if name not in api.IMPLEMENTATIONS:
        raise ValueError(f"{given}: expected auto or one of {', '.join(api.IMPLEMENTATIONS)}")
    if (only := _ONLY_ON.get(name, platform)) != platform:
        other = api.BY_PLATFORM.get(platform, api.WITHOUT_COMPILER)
        raise ValueError(f"{given}: runs on {only.upper()}s only, not on {platform!r}; {other} would run")
    if name == NATIVE and compiled.compiler() is None:
        raise ValueError(f"{given}: needs a C++ compiler (c++) on PATH; {api.WITHOUT_COMPILER} would run")
    return name
