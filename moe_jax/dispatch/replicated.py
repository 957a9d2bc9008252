"""Dispatch of tokens that are on every device of the experts: each runs its own experts; one sum over the devices.

For decode steps. The sum moves the same bytes whatever the number of slots. Its gradient takes one sum more than it
would need: nobody trains this way.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.contract import Counts, Dispatch, Experts
from moe_jax.dispatch.local import run_own
from moe_jax.routing.selection import Selection

SPLIT = False


def own(selection: Selection, experts: Experts, how: Dispatch) -> Selection:
    """Keeps the slots of this device's experts, counted from the first of them; inside `shard_map`."""
    num_own = experts.down_LEDF.shape[1]
    expert_NK = selection.expert_NK - lax.axis_index(how.expert_axes) * num_own
    keep_NK = selection.keep_NK & (expert_NK >= 0) & (expert_NK < num_own)
    return Selection(expert_NK, selection.weight_NK, keep_NK)


def run(
    x_ND: jax.Array, selection: Selection, experts: Experts, kernel: str, how: Dispatch
) -> tuple[jax.Array, Counts]:
    """As `api.dispatch`, inside `shard_map`."""
    y_ND, load_local_E = run_own(x_ND, own(selection, experts, how), experts, kernel)
    with jax.named_scope("combine"):
        y_ND = lax.psum(y_ND, (*how.expert_axes, "tensor"))
    return y_ND, Counts(lax.psum(load_local_E, how.other_axes), jnp.int32(0), jnp.int32(0))
