"""Fine-grained Mixture-of-Experts language models with fewer active experts, in JAX.

`import moe_jax` is fast: each public name imports what it needs on first use.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_jax.api import Completion, Model, load
    from moe_jax.config.gin import read_config
    from moe_jax.routing.policies import parse as policies

_HOMES = {
    "load": "moe_jax.api",
    "Model": "moe_jax.api",
    "Completion": "moe_jax.api",
    "read_config": "moe_jax.config.gin",
}

__all__ = ["Completion", "Model", "load", "policies", "read_config"]


def __getattr__(name: str):
    if name == "policies":
        value = importlib.import_module("moe_jax.routing.policies.parse")
    elif name == "__version__":
        value = importlib.metadata.version("moe_jax")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
