"""Dispatch: brings tokens to the devices of their experts, runs these, and adds up the weighted results.

On a mesh every implementation is a `shard_map`. Experts stay where they are: E over the expert axes, F over `tensor`,
the same on all of `data`. What moves is tokens, in one of two layouts:

- `SPLIT`: x_ND is spread over (`data`, `expert`), and D over `tensor`; so is y_ND. Tokens that lie over `data` alone
  are sliced on entry, at no cost, and gathered by XLA where y_ND is used.
- not `SPLIT`: x_ND is spread over `data`, unless experts lie over it too, and is the same on all other axes; so is
  y_ND. This suits decode steps, whose tokens are few and everywhere.

N need not be a multiple of the devices: missing tokens are added, with no slot kept, and cut off again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch import all_gather, all_to_all, local, ragged, replicated
from moe_jax.dispatch.contract import Counts, Dispatch, Experts
from moe_jax.routing.selection import Selection

IMPLEMENTATIONS = {
    "local": local,
    "replicated": replicated,
    "all_gather": all_gather,
    "all_to_all": all_to_all,
    "ragged": ragged,
}


def dispatch(
    x_ND: jax.Array, selection: Selection, experts: Experts, kernel: str, how: Dispatch
) -> tuple[jax.Array, Counts]:
    """Runs the selected experts on their tokens.

    Differentiable in x_ND, the mixing weights and the experts. Sums over devices are in the dtype of `x_ND`. Called
    outside `shard_map`, with global arrays.

    Args:
        x_ND: activations.
        selection: the slots of each token; the kept ones of a token have distinct experts.
        experts: the weights.
        kernel: the implementation of grouped_matmul.
        how: which implementation, and on which mesh.

    Returns:
        y_ND in the dtype of `x_ND`, and what was counted.

    Raises:
        ValueError: the implementation is unknown, or the mesh does not divide D, E or F.
    """
    if how.name not in IMPLEMENTATIONS:
        raise ValueError(f"dispatch = {how.name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if how.mesh is None:
        if how.name != "local":
            raise ValueError(f"dispatch = {how.name!r} on one device: expected local, or a mesh")
        return local.alone(x_ND, selection, experts, kernel)
    _require_divisible(experts, how)
    implementation = IMPLEMENTATIONS[how.name]
    rows = how.row_axes if implementation.SPLIT else how.other_axes
    x_spec = P(rows, "tensor" if implementation.SPLIT else None)
    run = jax.shard_map(
        functools.partial(implementation.run, kernel=kernel, how=how),
        mesh=how.mesh,
        in_specs=(x_spec, P(rows), how.specs_of(experts)),
        out_specs=(x_spec, Counts(P(how.expert_axes), P(), P())),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    num_tokens, shards = len(x_ND), math.prod(how.mesh.shape[axis] for axis in rows)
    padded = (0, -num_tokens % shards)
    x_ND, selection = jax.tree.map(
        lambda part: jnp.pad(part, (padded, *((0, 0),) * (part.ndim - 1))), (x_ND, selection)
    )
    y_ND, counts = run(x_ND, selection, experts)
    return y_ND[:num_tokens], counts


def _require_divisible(experts: Experts, how: Dispatch) -> None:
    _, num_experts, _, hidden, d_model = experts.gate_up_LEIFD.shape
    for what, size, axes, shards in (
        ("experts", num_experts, " x ".join(how.expert_axes), how.expert_shards),
        ("hidden width of an expert", hidden, "tensor", how.tensor_shards),
        ("model width", d_model, "tensor", how.tensor_shards),
    ):
        if size % shards:
            raise ValueError(f"{what} = {size}: expected a multiple of {shards}, the size of mesh axis {axes}")
