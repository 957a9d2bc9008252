"""Dispatch on one device: sort the slots by expert, run the experts, combine."""

from collections.abc import Callable

import jax

from moe_jax.dispatch.plan import plan
from moe_jax.kernels.combine.api import combine, spread
from moe_jax.routing.selection import Selection


def dispatch(
    x_ND: jax.Array, selection: Selection, num_experts: int, experts: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Runs the selected experts on their tokens.

    Args:
        x_ND: activations.
        selection: the slots of each token.
        num_experts: E, static.
        experts: computes out_SD, unweighted, from rows_SD sorted by expert and group_sizes_E.

    Returns:
        y_ND, and group_sizes_E int32: the kept slots of each expert.
    """
    order = plan(selection, num_experts)
    with jax.named_scope("dispatch"):
        rows_SD = spread(x_ND, order.token_S, order.position_NK)
    with jax.named_scope("experts"):
        out_SD = experts(rows_SD, order.group_sizes_E)
    with jax.named_scope("combine"):
        y_ND = combine(out_SD, selection.weight_NK, order.token_S, order.position_NK)
    return y_ND, order.group_sizes_E
