"""The MoE layer: route, select, dispatch to the routed experts, add the shared experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.architecture import MoEConfig
from moe_jax.dispatch.api import dispatch
from moe_jax.dispatch.contract import Dispatch, Experts
from moe_jax.model.layers import feed_forward
from moe_jax.routing import balance, policies
from moe_jax.routing.mask import masked
from moe_jax.routing.router import route


class ExpertUse(NamedTuple):
    """How one MoE layer used its experts."""

    load_E: jax.Array  # int32: slots that each expert received
    load_loss: jax.Array  # float32 scalar, see `balance.load_loss`
    effective_experts: jax.Array  # float32 scalar, see `balance.effective_experts`
    chosen_NK: jax.Array  # int32: the expert of each slot; -1: not kept
    overflow: jax.Array  # int32 scalar: kept slots that were not computed, see `Dispatch.drop`


def moe_layer(
    x_ND: jax.Array,
    weights: dict[str, Any],
    experts: dict[str, jax.Array],
    layer: jax.Array,
    live: policies.Settings,
    context: policies.Context,
    moe: MoEConfig,
    k_max: int,
    kernel: str,
    how: Dispatch,
) -> tuple[jax.Array, ExpertUse]:
    """One MoE layer.

    Args:
        x_ND: normed activations.
        weights: this layer's weights, names without the leading L: `router` (with a `mask_E` while a mask is trained)
            and, where the model has them, `shared` and `shared_gate_D`.
        experts: the stack that holds the routed experts.
        layer: int32 scalar, this layer's index in that stack.
        live: settings of the policy.
        context: requests and validity of the tokens; its layer is the column of the settings.
        moe: the MoE settings.
        k_max: K, static.
        kernel: the implementation of grouped_matmul.
        how: how tokens reach their experts.

    Returns:
        y_ND, and how it used its experts.
    """
    with jax.named_scope("route"):
        routing = route(x_ND, weights["router"]["weight_ED"], weights["router"].get("bias_E"), moe)
    with jax.named_scope("select"):
        selection = policies.select(routing, live, context, moe, k_max)
        if "mask_E" in weights["router"]:
            selection = masked(selection, weights["router"]["mask_E"])
    layer_experts = Experts(experts["gate_up_LEIFD"], experts["down_LEDF"], layer)
    if how.placement is None:
        y_ND, counts = dispatch(x_ND, selection, layer_experts, kernel, how)
    else:
        places = how.placement.to_places(selection, context.layer)
        y_ND, counts = dispatch(x_ND, places, layer_experts, kernel, how)
        counts = counts._replace(load_E=how.placement.to_experts(counts.load_E, context.layer))
    if moe.num_shared_experts:
        with jax.named_scope("shared_experts"):
            shared_ND = feed_forward(x_ND, weights["shared"])
            if moe.shared_gate:
                gate_N = jnp.einsum("nd,d->n", x_ND, weights["shared_gate_D"], preferred_element_type=jnp.float32)
                shared_ND = (jax.nn.sigmoid(gate_N)[:, None] * shared_ND).astype(x_ND.dtype)
            y_ND = y_ND + shared_ND
    load_loss = balance.load_loss(routing, counts.load_E.astype(jnp.float32), context.valid_N)
    effective_experts = balance.effective_experts(selection, context.valid_N)
    chosen_NK = jnp.where(selection.keep_NK, selection.expert_NK, -1)
    return y_ND, ExpertUse(counts.load_E, load_loss, effective_experts, chosen_NK, counts.overflow)
