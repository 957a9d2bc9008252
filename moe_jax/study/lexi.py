"""The data-free proxy of LExI: how much a MoE layer's output changes with fewer experts, on random inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import layer_order
from moe_jax.model import decoder, dtypes
from moe_jax.model.finite import require_finite
from moe_jax.model.moe import moe_layer
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse

DRAWS = 16  # over which norms are averaged
TOKENS = 256  # of one draw


def sensitivities(params: decoder.Params, execution: decoder.Execution, seed: int) -> np.ndarray:
    """cost_LK: the proxy for the cost of k experts in a layer, at index k - 1; inf above the layer's own k.

    For each MoE layer, `DRAWS` times: `TOKENS` vectors of independent standard normal numbers go into the router and
    the experts, in the place of normed activations; once with the layer's own k and once with each smaller k, weighted
    by the model's own rule; the Frobenius norm of the difference between both outputs [TOKENS, D] is taken. The cost is
    the mean of these norms (LExI, arXiv 2509.02753, stage 1). Shared experts are left out: their output is the same
    for every k. A text is not read, and neither is what comes after the layer.

    Args:
        params: as `decoder.split` gives them.
        execution: the static half of the step, on one device.
        seed: of the draws.

    Raises:
        NotFiniteError: a norm is NaN or infinite.
    """
    architecture = execution.architecture
    own_L = architecture.k_L
    live = policies.settings([parse(f"topk:{k}") for k in range(1, max(own_L) + 1)], architecture, execution.k_max)
    cost_LK = np.full((len(own_L), max(own_L)), np.inf)
    shape, dtype = (TOKENS, architecture.decoder.d_model), dtypes.dtype_of(params)
    for stack, index, _, column in filter(lambda layer: layer.is_moe, layer_order.layers(architecture)):
        own = own_L[column]
        router = {name.replace("_L", "_"): value[index] for name, value in params[stack]["router"].items()}
        layer = router, params[stack]["experts"], np.int32(index), np.int32(column)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), column), DRAWS)
        norms = [_norms(jax.random.normal(key, shape, dtype), *layer, live, own, stack, execution) for key in keys]
        cost_LK[column, :own] = np.mean(norms, axis=0)[:own]
        require_finite(cost_LK[column, :own], "the outputs of experts on random inputs", params)
    return cost_LK


@functools.partial(jax.jit, static_argnames=("own", "stack", "execution"))
def _norms(x_ND, router, experts, index, column, live, own, stack, execution):
    """norm_K: of the difference between the outputs of a layer with k and with its own number of experts."""
    moe = layer_order.moe_of(execution.architecture, stack)
    alone = dataclasses.replace(moe, num_shared_experts=0, shared_hidden=0, shared_gate=False)
    rows, tokens = len(live.group_B), len(x_ND)
    context = policies.Context(column, jnp.repeat(jnp.arange(rows), tokens), jnp.ones(rows * tokens, bool), 0)
    k_max, kernel = min(execution.k_max, moe.num_experts), execution.kernels.grouped_matmul
    how = execution.dispatch.of(rows * tokens)
    y_ND, _ = moe_layer(
        jnp.tile(x_ND, (rows, 1)), {"router": router}, experts, index, live, context, alone, k_max, kernel, how
    )
    y_PND = y_ND.astype(jnp.float32).reshape(rows, tokens, -1)
    return jnp.sqrt(jnp.square(y_PND - y_PND[own - 1 : own]).sum(axis=(1, 2)))
