"""JAX's devices and its compilation cache, for one run."""

import logging as standard_logging
import os
from typing import Any

from absl import logging

from moe_jax import files
from moe_jax.command import folders


def configure_jax(virtual_devices: int = 0, keep_programs: bool = True) -> None:
    """Imports JAX and turns on its compilation cache, if its folder is writable.

    Args:
        virtual_devices: the number of devices to make on the CPU, whatever else there is; 0: the machine's own.
        keep_programs: whether to turn on the cache; programs for devices that are not here cannot be read from it.
    """
    import jax

    if virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", virtual_devices)

    for library in ("jax", "matplotlib", "httpx", "httpx2"):
        standard_logging.getLogger(library).setLevel(standard_logging.WARNING)
    if not keep_programs:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(files.cache_folder() / "xla")
    if "://" not in folder:
        try:
            folders.open_folder(folder)
        except ValueError as error:
            logging.warning("compiled programs are not kept for the next run: %s", error)
            folder = None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # of any size


def require_device() -> None:
    """Raises ValueError if JAX finds no device of the platforms in JAX_PLATFORMS."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: jaxlib knows the platform but has no plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())
        raise ValueError(
            f"JAX_PLATFORMS = {asked!r}: JAX finds no such device; expected cpu, or the extra of the package that "
            f"installs it, as in pip install -e .[cuda13]{f' ({reason})' if reason else ''}"
        ) from error


def device() -> dict[str, Any]:
    """The device of this run, as `result.json` names it."""
    import jax

    from moe_jax.cost import hardware

    count = {"count": jax.device_count(), "cores": os.cpu_count()}
    return {"platform": jax.devices()[0].platform, "kind": hardware.kind()} | count
