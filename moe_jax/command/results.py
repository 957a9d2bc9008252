"""What `result.json` holds: figures, and with what they were measured."""

import importlib.metadata
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping
from typing import Any

from moe_jax.command import devices


def provenance() -> dict[str, Any]:
    """What figures were measured with: package versions and the device."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "moe_jax")}
    return {"versions": {**packages, "python": platform.python_version()}, "device": devices.device()}


def peak_memory_bytes() -> int:
    """Peak memory of the fullest local device, or of this process if devices do not report it (CPU)."""
    import jax

    device_bytes = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(device_bytes) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plain(value):
    """Converts a value for JSON: arrays to lists and numbers, paths to text, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
