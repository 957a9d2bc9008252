"""A trained mask of experts: which experts a layer can do without, learned by gradient (arXiv 2605.14438).

A masked expert contributes nothing; the weights of the others do not change. Setting the output weights of that expert
to zero does the same, which is how a mask is exported.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.layer_order import moe_stacks
from moe_jax.routing.selection import Selection

START = 0.05  # initial value: above zero, yet a learning rate of 1e-4 crosses zero within some hundred steps


def masked(selection: Selection, mask_E: jax.Array) -> Selection:
    """Sets the weights of masked experts to zero, with a straight-through gradient (arXiv 1308.3432).

    Forward, the gate of an expert is 1 if its mask is above 0, else 0; backward, it is the mask's sigmoid. The slot
    stays kept, since the gradient needs the expert's output to decide whether to unmask it.
    """
    soft_E = jax.nn.sigmoid(mask_E)
    gate_E = jnp.where(mask_E > 0, 1.0, 0.0) + soft_E - jax.lax.stop_gradient(soft_E)
    return selection._replace(weight_NK=selection.weight_NK * gate_E[selection.expert_NK])


def merge(params: dict[str, Any]) -> dict[str, Any]:
    """Equivalent parameters without a mask: masked experts have output weights of zero."""
    for stack in moe_stacks(params):
        router = dict(params[stack]["router"])
        mask_LE = router.pop("mask_LE", None)
        if mask_LE is not None:
            experts = dict(params[stack]["experts"])
            experts["down_LEDF"] = jnp.where(mask_LE[:, :, None, None] > 0, experts["down_LEDF"], 0)
            params = params | {stack: params[stack] | {"router": router, "experts": experts}}
    return params
