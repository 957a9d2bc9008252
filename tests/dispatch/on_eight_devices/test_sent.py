"""What the choice of a dispatch counts is what compiled programs send."""

import math

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.cost.collectives import collectives
from moe_jax.dispatch.api import dispatch
from moe_jax.dispatch.choose import sent
from moe_jax.dispatch.contract import Dispatch
from tests.dispatch import routed

TOKENS, D = 256, 1024  # wide, so that the router's choice is small


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["replicated", "all_gather", "all_to_all"])
@pytest.mark.parametrize(
    ("sizes", "axes"), [((1, 8, 1), ("expert",)), ((2, 2, 2), ("expert",)), ((2, 2, 2), ("data", "expert"))]
)
def test_rows_that_a_device_sends(mesh_of, sizes, axes, name, training):
    """With tokens and results spread over `data`, as the rest of a model has them."""
    how = Dispatch(name, mesh_of(sizes), axes, capacity=1.0, drop=name == "all_to_all")
    specs = jax.tree.map(lambda spec: NamedSharding(how.mesh, spec), how.experts_specs)
    experts = jax.device_put(routed.experts(d_model=D), specs)
    rows = NamedSharding(how.mesh, P("data"))
    x_ND, selection = jax.device_put((routed.tokens(TOKENS, D), routed.selection("even", TOKENS)), rows)
    y_grad_ND = jax.device_put(routed.tokens(TOKENS, D)[::-1], rows)

    def step(x_ND, y_grad_ND, selection, experts):
        def forward(x_ND):
            return jax.lax.with_sharding_constraint(dispatch(x_ND, selection, experts, "blocked", how)[0], rows)

        if not training:
            return forward(x_ND)
        y_ND, pull = jax.vjp(forward, x_ND)
        return y_ND, jax.lax.with_sharding_constraint(pull(y_grad_ND)[0], rows)

    program = jax.jit(step).lower(x_ND, y_grad_ND, selection, experts).compile()
    groups = math.prod(how.mesh.shape[axis] for axis in how.other_axes)
    rows_sent = sum(one.sent_bytes for one in collectives(program.as_text())) / (4 * D) / (TOKENS / groups)
    assert rows_sent == pytest.approx(sent(name, routed.K, how, training).rows, rel=0.01)
