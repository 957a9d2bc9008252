"""A trained mask of experts: which of them a layer does without, found by gradient (arXiv 2605.14438).

A masked expert gives nothing, and the others keep the weights that they have. A model that has zeros for the output
weights of that expert does the same, which is how a mask is exported.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.layers import moe_stacks
from moe_jax.routing.selection import Selection

START = 0.05  # of every expert: above zero, and so near that a learning rate of 1e-4 gets past it in some hundred steps


def masked(selection: Selection, mask_E: jax.Array) -> Selection:
    """Takes the weight from slots whose expert is masked, with a straight-through gradient (arXiv 1308.3432).

    Forward the gate of an expert is 1 where its mask is above 0, else 0; backward it is the mask's sigmoid. The slot
    stays kept, since only what an expert would have given tells whether to take it back.
    """
    soft_E = jax.nn.sigmoid(mask_E)
    gate_E = jnp.where(mask_E > 0, 1.0, 0.0) + soft_E - jax.lax.stop_gradient(soft_E)
    return selection._replace(weight_NK=selection.weight_NK * gate_E[selection.expert_NK])


def merge(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without a mask that do the same: masked experts have output weights of zero."""
    for stack in moe_stacks(params):
        router = dict(params[stack]["router"])
        mask_LE = router.pop("mask_LE", None)
        if mask_LE is not None:
            experts = dict(params[stack]["experts"])
            experts["down_LEDF"] = jnp.where(mask_LE[:, :, None, None] > 0, experts["down_LEDF"], 0)
            params = params | {stack: params[stack] | {"router": router, "experts": experts}}
    return params
