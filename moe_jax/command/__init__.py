"""What all launchers share: flags, one-line errors, interruption, timings and result.json.

A launcher is a docstring (its `--help`), a `main(run)` and one call:

    if __name__ == "__main__":
        command.run(main, default_config="configs/infer_demo.gin")

It imports JAX, and modules that need JAX, inside `main`, so that a wrong flag is refused at once.
"""

from moe_jax.command.devices import configure_jax
from moe_jax.command.folders import in_repository
from moe_jax.command.launcher import Command, run
from moe_jax.command.results import plain, provenance

__all__ = ["Command", "configure_jax", "in_repository", "plain", "provenance", "run"]
