"""What policies keep of recorded experts: to time those that look at all rows of a step, without a trained router."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.model.execution import Execution
from moe_jax.routing import policies
from moe_jax.routing.policies import registry
from moe_jax.routing.policies.kind import RowWise
from moe_jax.routing.selection import Routing


def require_ranks(policy: policies.Policy) -> None:
    """Checks that a policy can decide from the order of a token's experts, without their weights.

    Raises:
        ValueError: it compares weights.
    """
    comparing = {name for kind in registry.KINDS if issubclass(kind, RowWise) for name in kind.sets}
    for part in policy.parts:
        if comparing & {*part.sets}:
            raise ValueError(
                f"policy {policy.spec!r}: {part.spec} compares weights, and recorded routing has none: expected a "
                "policy of numbers of experts; launch/sweep.py measures this one"
            )


def decide(policy: policies.Policy, expert_SLBK: np.ndarray, execution: Execution) -> np.ndarray:
    """The experts that the rows of decode steps keep under a policy.

    A row's recorded expert of rank r, 0 being the best, has the weight K - r; all other experts have random ones
    below 1. So which experts enter a set is as recorded up to that choice of weights, and how many a row keeps too;
    with which others a row fills its slots, if not all of its own are in the set, is random.

    Args:
        policy: of every row; see `require_ranks`.
        expert_SLBK: of S steps, the best first; as many slots as the model has.
        execution: of the model.

    Returns:
        chosen_SLBK int32; -1: not kept.

    Raises:
        ValueError: the policy does not fit the model, or needs what was not recorded.
    """
    require_ranks(policy)
    steps, layers, rows, _ = expert_SLBK.shape
    settings = policies.settings([policy] * rows, execution.architecture, execution.k_max)
    seeds_P = np.arange(steps * layers, dtype=np.uint32)
    flat_PBK = expert_SLBK.reshape(steps * layers, rows, -1)
    chosen_PBK = _decided(settings, flat_PBK, seeds_P % layers, seeds_P, execution=execution)
    return np.asarray(chosen_PBK).reshape(steps, layers, rows, -1)


@functools.partial(jax.jit, static_argnames="execution")
def _decided(settings, expert_PBK, layer_P, seed_P, *, execution: Execution):
    moe = execution.architecture.moe
    rows, slots = expert_PBK.shape[1:]

    def one(given):
        expert_BK, layer, seed = given
        mix_BE = jax.random.uniform(jax.random.key(seed), (rows, moe.num_experts))
        mix_BE = mix_BE.at[jnp.arange(rows)[:, None], expert_BK].set(slots - jnp.arange(slots, dtype=jnp.float32)[None])
        context = policies.Context(layer, jnp.arange(rows), jnp.ones(rows, bool), steps=1)
        selection = policies.select(Routing(mix_BE, mix_BE), settings, context, moe, execution.k_max)
        return jnp.where(selection.keep_NK, selection.expert_NK, -1)

    return lax.map(one, (expert_PBK, layer_P, seed_P))
