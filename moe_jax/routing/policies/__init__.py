"""Policies: which experts a token keeps, and with what weights. `registry.py` lists the kinds."""

from moe_jax.routing.policies.binding import Settings, settings
from moe_jax.routing.policies.policy import Policy, fixed_k, uniform_k, with_own
from moe_jax.routing.policies.replay import Replayed
from moe_jax.routing.policies.selecting import Context, select

__all__ = ["Context", "Policy", "Replayed", "Settings", "fixed_k", "select", "settings", "uniform_k", "with_own"]
