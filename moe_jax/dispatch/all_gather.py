"""Dispatch by gathering: every device gets the tokens of all, runs its own experts, and the sums are scattered.

The bytes are the same whatever the number of slots: few devices, or many slots per token.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.contract import Counts, Dispatch, Experts
from moe_jax.dispatch.local import gather_columns, run_own, scatter_columns
from moe_jax.dispatch.replicated import own
from moe_jax.routing.selection import Selection

SPLIT = True


def run(
    x_local_ND: jax.Array, selection: Selection, experts: Experts, kernel: str, how: Dispatch
) -> tuple[jax.Array, Counts]:
    """As `api.dispatch`, inside `shard_map`."""
    with jax.named_scope("dispatch"):
        x_ND = lax.all_gather(x_local_ND, how.expert_axes, axis=0, tiled=True)
        x_ND = gather_columns(x_ND, how)
        selection = Selection(*(lax.all_gather(part, how.expert_axes, axis=0, tiled=True) for part in selection))
    y_ND, load_local_E = run_own(x_ND, own(selection, experts, how), experts, kernel)
    with jax.named_scope("combine"):
        y_ND = scatter_columns(y_ND, how)
        y_local_ND = lax.psum_scatter(y_ND, how.expert_axes, scatter_dimension=0, tiled=True)
    return y_local_ND, Counts(lax.psum(load_local_E, how.other_axes), jnp.int32(0), jnp.int32(0))
