"""What a token sends in one MoE layer, by dispatch and experts per token.

Read from compiled programs; for `ragged`, whose sends are data, counted in a run. In rows of D numbers per token, over
all devices, forward: what has to leave a device. Tokens lie on different devices, and choose their experts uniformly at
random.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from moe_jax.config.architecture import MoEConfig
from moe_jax.cost.collectives import collectives
from moe_jax.dispatch.api import dispatch
from moe_jax.dispatch.contract import Dispatch, Experts
from moe_jax.routing.selection import Selection

DEVICES, TOKENS = 8, 512
CAPACITY = 1.25  # of `all_to_all`
NAMES = ("replicated", "all_gather", "all_to_all", "ragged")


def rows_per_token(d_model: int, moe: MoEConfig, slots: Sequence[int], seed: int) -> dict[int, dict[str, float]]:
    """The rows by slots per token, then by dispatch; beside them those of tensor parallelism.

    Args:
        d_model: D.
        moe: the number of experts and their width.
        slots: for each program, the slots per token, all kept.
        seed: of the choice of experts.
    """
    mesh = jax.make_mesh((1, DEVICES, 1), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    random = np.random.default_rng(seed)
    x_ND = random.standard_normal((TOKENS, d_model)).astype(np.float32)
    expert_NK = random.permuted(np.tile(np.arange(moe.num_experts, dtype=np.int32), (TOKENS, 1)), axis=1)
    experts = Experts(
        random.standard_normal((1, moe.num_experts, 2, moe.expert_hidden, d_model)).astype(np.float32),
        random.standard_normal((1, moe.num_experts, d_model, moe.expert_hidden)).astype(np.float32),
        np.int32(0),
    )
    found = {}
    for k in slots:
        ones = np.ones((TOKENS, k), np.float32)
        selection = Selection(expert_NK[:, :k], ones / k, ones > 0)
        found[k] = {name: _rows(Dispatch(name, mesh), x_ND, selection, experts) for name in NAMES}
        found[k]["tensor"] = 2.0 * (DEVICES - 1)
    return found


def _rows(how: Dispatch, x_ND: np.ndarray, selection: Selection, experts: Experts) -> float:
    if how.name == "all_to_all":
        how = Dispatch(how.name, how.mesh, capacity=CAPACITY, drop=True)
    shardings = jax.tree.map(lambda spec: NamedSharding(how.mesh, spec), how.experts_specs)
    operands = x_ND, selection, jax.device_put(experts, shardings)
    program = jax.jit(lambda *operands: dispatch(*operands, "blocked", how)).lower(*operands).compile()
    if how.name == "ragged":
        return 2 * int(program(*operands)[1].sent) / len(x_ND)
    return DEVICES * sum(one.sent_bytes for one in collectives(program.as_text())) / x_ND.nbytes
