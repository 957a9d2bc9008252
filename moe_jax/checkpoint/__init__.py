"""Models on disk: `open` one, then `load` its weights."""

from moe_jax.checkpoint.opened import LAYOUTS, Checkpoint, new, open

__all__ = ["LAYOUTS", "Checkpoint", "new", "open"]
