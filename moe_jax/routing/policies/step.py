"""Functions shared by the kinds that choose experts for all rows of a decode step together.

Each works on the B rows of one step; `same_BB` says which rows act together. The slots given are those that a row's
other parts kept. A row never keeps more slots than that, but they may get other experts.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.routing.selection import Routing, Slots


def holds(slots: Slots, count_B: jax.Array, num_experts: int) -> jax.Array:
    """bool_BE: whether an expert is in the first `count_B` slots that a row keeps."""
    early_BK = slots.keep_NK & (jnp.cumsum(slots.keep_NK, axis=1) <= count_B[:, None])
    return ((slots.expert_NK[:, :, None] == jnp.arange(num_experts)[None, None]) & early_BK[:, :, None]).any(axis=1)


def anyone(same_BB: jax.Array, holds_BE: jax.Array) -> jax.Array:
    """bool_BE: whether `holds_BE` is true for any row that acts together with this one."""
    return same_BB.astype(jnp.float32) @ holds_BE.astype(jnp.float32) > 0


def filled(slots: Slots, routing: Routing, pool_BE: jax.Array, acting_B: jax.Array) -> Slots:
    """Fills the slots that each acting row keeps with the best experts of its pool; fewer if the pool is smaller."""
    score_BK, expert_BK = lax.top_k(jnp.where(pool_BE, routing.score_NE, -jnp.inf), slots.keep_NK.shape[1])
    kept_B = slots.keep_NK.sum(axis=1)
    keep_BK = (jnp.arange(expert_BK.shape[1])[None] < kept_B[:, None]) & (score_BK > -jnp.inf)
    mix_BK = jnp.take_along_axis(routing.mix_NE, expert_BK, axis=1)
    filled = Slots(expert_BK.astype(jnp.int32), mix_BK, keep_BK)
    return jax.tree.map(lambda new, old: jnp.where(acting_B[:, None], new, old), filled, slots)
