"""What each expert contributes on a text: how often it is chosen, with which weight, and how large its output is."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import layer_order
from moe_jax.config.architecture import MoEConfig
from moe_jax.dispatch.plan import plan
from moe_jax.kernels.combine.api import combine, spread
from moe_jax.kernels.expert_ffn.api import expert_ffn
from moe_jax.model import decoder
from moe_jax.model.execution import Execution
from moe_jax.model.finite import require_finite
from moe_jax.routing import policies
from moe_jax.routing.policies import Context, Settings
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.routing.router import route

ROWS = 8  # sequences per batch


class ExpertStatistics(NamedTuple):
    """Sums over the tokens that chose an expert, with the model's own k; float64. Padding is not a token.

    An expert's weight is the one that its output is mixed with: normalized and scaled as the model does. The norm is
    the L2 norm of its output before weighting. A token's contribution is 1 - cos(h, h + y), where h is the residual
    stream before the layer and y the weighted sum of its routed experts; at least 0. The entries of experts that a
    layer does not have are 0.
    """

    count_LE: np.ndarray  # tokens
    weight_LE: np.ndarray  # sum of weight
    weighted_norm_LE: np.ndarray  # sum of weight x norm
    contribution_LE: np.ndarray  # sum of contribution x weight x norm


class CalibrationRows(NamedTuple):
    """Rows of tokens, padded at their end."""

    tokens_JT: np.ndarray  # int32
    valid_JT: np.ndarray  # bool


def rows_of(documents: Iterable[np.ndarray], length: int, tokens: int) -> CalibrationRows:
    """The first `length` tokens of each document, from the first document on, until there are `tokens` of them.

    No further document is read. The number of rows is a multiple of `ROWS`; the last ones may be padding.
    """
    taken, total = [], 0
    for document in documents:
        taken.append(document[: min(length, tokens - total)])
        total += len(taken[-1])
        if total == tokens:
            break
    count = -(-len(taken) // ROWS) * ROWS
    tokens_JT, valid_JT = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for row, document in enumerate(taken):
        tokens_JT[row, : len(document)] = document
        valid_JT[row, : len(document)] = True
    return CalibrationRows(tokens_JT, valid_JT)


def measure(
    params: decoder.Params, rows: CalibrationRows, execution: Execution, advance: Callable[[], object] = lambda: None
) -> ExpertStatistics:
    """Runs the full model once over all rows.

    Args:
        params: from `decoder.split`.
        rows: from `rows_of`.
        execution: static settings of the full model, on one device.
        advance: called after each batch of `ROWS` rows.

    Raises:
        NotFiniteError: a measured number is NaN or infinite.
    """
    architecture = execution.architecture
    live = policies.settings([MODEL_OWN] * ROWS, architecture, execution.k_max)
    inputs = jax.jit(decoder.moe_inputs, static_argnums=3)
    moe_layers = [layer for layer in layer_order.layers(architecture) if layer.is_moe]
    sums_MLE = np.zeros((len(ExpertStatistics._fields), len(moe_layers), architecture.moe.num_experts))
    for first in range(0, len(rows.tokens_JT), ROWS):
        batch = slice(first, first + ROWS)
        x_LND, residual_LND = inputs(params, rows.tokens_JT[batch], live, execution)
        valid_N = rows.valid_JT[batch].reshape(-1)
        for stack, index, _, column in moe_layers:
            moe = layer_order.moe_of(architecture, stack)
            router = {name: value[index] for name, value in params[stack]["router"].items()}
            given = x_LND[column], residual_LND[column], valid_N, router, params[stack]["experts"], index, column, live
            k_max = min(execution.k_max, moe.num_experts)
            sums_ME = _layer_sums(*given, moe=moe, k_max=k_max, kernel=execution.kernels.grouped_matmul)
            sums_MLE[:, column, : moe.num_experts] += np.float64(sums_ME)
        advance()
    require_finite(sums_MLE, "the outputs of experts", params)
    return ExpertStatistics(*sums_MLE)


@functools.partial(jax.jit, static_argnames=("moe", "k_max", "kernel"))
def _layer_sums(
    x_ND: jax.Array,
    residual_ND: jax.Array,
    valid_N: jax.Array,
    router: dict[str, jax.Array],
    experts: dict[str, jax.Array],
    index: int,
    column: int,
    live: Settings,
    *,
    moe: MoEConfig,
    k_max: int,
    kernel: str,
) -> jax.Array:
    """The fields of `ExpertStatistics` for one layer and batch, float32 [fields, E].

    Args:
        x_ND: normed input of the layer.
        residual_ND: the residual stream before the norm.
        valid_N: False for padding.
        router: of the layer.
        experts: the stack that holds the layer's experts.
        index: of the layer in that stack.
        column: of the layer among the MoE layers.
        live: settings of the model's own k, the same in every row.
        moe: the MoE settings of the layer.
        k_max: slots per token.
        kernel: the implementation of grouped_matmul.
    """
    routing = route(x_ND, router["weight_LED"], router.get("bias_LE"), moe)
    context = Context(column, jnp.zeros(len(x_ND), jnp.int32), valid_N, 0)
    selection = policies.select(routing, live, context, moe, k_max)
    order = plan(selection, moe.num_experts)
    rows_SD = spread(x_ND, order.token_S, order.position_NK)
    stacks = experts["gate_up_LEIFD"], experts["down_LEDF"]
    out_SD = expert_ffn(rows_SD, *stacks, order.group_sizes_E, index, kernel)
    y_ND = combine(out_SD, selection.weight_NK, order.token_S, order.position_NK).astype(jnp.float32)
    norm_S = jnp.linalg.norm(out_SD.astype(jnp.float32), axis=1)
    weighted_norm_NK = selection.weight_NK * norm_S[order.position_NK]
    contribution_N = _contribution(residual_ND.astype(jnp.float32), y_ND)
    slots = (
        selection.keep_NK.astype(jnp.float32),
        selection.weight_NK,
        weighted_norm_NK,
        contribution_N[:, None] * weighted_norm_NK,
    )
    chosen_NK = jnp.where(selection.keep_NK, selection.expert_NK, moe.num_experts)  # none: dropped by the sum
    return jnp.stack(
        [jax.ops.segment_sum(slot_NK.reshape(-1), chosen_NK.reshape(-1), moe.num_experts) for slot_NK in slots]
    )


def _contribution(h_ND: jax.Array, y_ND: jax.Array) -> jax.Array:
    """1 - cos(h, h + y) of each token, at least 0."""
    after_ND = h_ND + y_ND
    lengths_N = jnp.linalg.norm(h_ND, axis=1) * jnp.linalg.norm(after_ND, axis=1)
    cosine_N = (h_ND * after_ND).sum(axis=1) / jnp.maximum(lengths_N, jnp.finfo(jnp.float32).tiny)
    return jnp.maximum(1 - cosine_N, 0)
