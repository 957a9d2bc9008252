"""The memory that is free, and the one check of what is about to be taken."""

import jax
import psutil


def host_bytes() -> int:
    """Free memory of this machine."""
    return psutil.virtual_memory().available


def device_bytes(count: int = 1) -> int:
    """Free memory of `count` devices like the first; of this machine, if devices do not report their own (a CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return count * (stats["bytes_limit"] - stats["bytes_in_use"]) if "bytes_limit" in stats else host_bytes()


def require(what: str, needed_bytes: int, available_bytes: int, remedy: str) -> None:
    """Checks that something fits before memory is taken for it.

    Args:
        what: needs the memory, for the message.
        needed_bytes: its size.
        available_bytes: `host_bytes()` for what is read into the machine's memory, else `device_bytes()`.
        remedy: what would fit, for the message.

    Raises:
        ValueError: it does not fit.
    """
    if needed_bytes > available_bytes:
        raise ValueError(
            f"{what} needs {needed_bytes / 1e9:,.1f} GB of memory, {available_bytes / 1e9:,.1f} GB available: expected "
            f"{remedy}"
        )
