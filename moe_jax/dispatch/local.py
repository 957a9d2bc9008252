"""Dispatch without exchange, where every device has all experts: sort the slots by expert, run these, combine."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.contract import Counts, Dispatch, Experts
from moe_jax.dispatch.plan import plan
from moe_jax.kernels.combine.api import combine, spread
from moe_jax.kernels.expert_ffn.api import expert_ffn
from moe_jax.routing.selection import Selection

SPLIT = True


def run_experts(rows_SD: jax.Array, group_sizes_E: jax.Array, experts: Experts, kernel: str) -> jax.Array:
    """out_SD of rows sorted by expert, unweighted; where F is spread over `tensor`, a device's part of the sum."""
    with jax.named_scope("experts"):
        return expert_ffn(
            rows_SD, experts.gate_up_LEIFD, experts.down_LEDF, group_sizes_E, experts.layer, implementation=kernel
        )


def own_columns(table: jax.Array, how: Dispatch) -> jax.Array:
    """The columns of this device's experts, of a table with one for each expert."""
    own_experts = table.shape[1] // how.expert_shards
    return lax.dynamic_slice_in_dim(table, lax.axis_index(how.expert_axes) * own_experts, own_experts, 1)


def gather_columns(rows_local_SD: jax.Array, how: Dispatch) -> jax.Array:
    """All of D, from all devices of `tensor`."""
    return rows_local_SD if how.tensor_shards == 1 else lax.all_gather(rows_local_SD, "tensor", axis=1, tiled=True)


def scatter_columns(rows_SD: jax.Array, how: Dispatch) -> jax.Array:
    """The sum over `tensor`, of which each device gets its columns."""
    if how.tensor_shards == 1:
        return rows_SD
    return lax.psum_scatter(rows_SD, "tensor", scatter_dimension=1, tiled=True)


def run_own(x_ND: jax.Array, selection: Selection, experts: Experts, kernel: str) -> tuple[jax.Array, jax.Array]:
    """Runs the experts of this device on tokens that are here.

    Args:
        x_ND: activations.
        selection: counted from this device's first expert; slots of other experts are not kept.
        experts: those of this device.
        kernel: the implementation of grouped_matmul.

    Returns:
        y_ND, and the kept slots of each expert, int32 [E].
    """
    order = plan(selection, experts.down_LEDF.shape[1])
    with jax.named_scope("dispatch"):
        rows_SD = spread(x_ND, order.token_S, order.position_NK)
    out_SD = run_experts(rows_SD, order.group_sizes_E, experts, kernel)
    with jax.named_scope("combine"):
        y_ND = combine(out_SD, selection.weight_NK, order.token_S, order.position_NK)
    return y_ND, order.group_sizes_E


def alone(x_ND: jax.Array, selection: Selection, experts: Experts, kernel: str) -> tuple[jax.Array, Counts]:
    """As `api.dispatch` on one device."""
    y_ND, load_E = run_own(x_ND, selection, experts, kernel)
    return y_ND, Counts(load_E, jnp.int32(0), jnp.int32(0))


def run(
    x_local_ND: jax.Array, selection: Selection, experts: Experts, kernel: str, how: Dispatch
) -> tuple[jax.Array, Counts]:
    """As `api.dispatch`, inside `shard_map`. Only columns of D travel, over `tensor`.

    Raises:
        ValueError: experts lie on several devices.
    """
    if how.expert_shards > 1:
        raise ValueError(f"dispatch = 'local': expected every expert on each device, got {how.expert_shards} shards")
    x_ND = gather_columns(x_local_ND, how)
    y_ND, load_E = run_own(x_ND, selection, experts, kernel)
    y_local_ND = scatter_columns(y_ND, how)
    return y_local_ND, Counts(lax.psum(load_E, how.other_axes), jnp.int32(0), jnp.int32(0))
