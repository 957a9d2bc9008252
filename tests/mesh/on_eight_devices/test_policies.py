"""Every kind of policy selects on every mesh what it selects on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.policies.registry import KINDS
from moe_jax.routing.router import route
from tests import tiny_model

E, K, D, L, LAYER = 32, 8, 64, 3, 1
GAP = 1e-5  # between scores; closer ones may change places
MOE = MoEConfig(num_experts=E, k=K, num_groups=4, num_groups_kept=2, selection_bias=True)
SPECS = (
    *("model", "topk:3", "schedule:8,2,4,1", "layers:6,5,4", "mass:0.7,min=2", "ratio:0.8", "median:scale=0.8"),
    *("opportunistic:2", "budget:10", "capacity:1.0,overflow=next", "reroute:3,0.5", "topk:5+renormalize:none"),
)
ROWS = [spec for spec in SPECS for _ in range(4)]  # so that rows of a kind lie on several devices
RANDOM = np.random.default_rng(2)
X_ND = RANDOM.standard_normal((len(ROWS), D)).astype(np.float32)
WEIGHT_ED = (RANDOM.standard_normal((E, D)) / D**0.5).astype(np.float32)
BIAS_E = (RANDOM.standard_normal(E) / 10).astype(np.float32)
SIMILARITY_LEE = RANDOM.uniform(-1, 1, (L, E, E)).astype(np.float32)
CALIBRATION = Calibration(np.array([0.4, 0.6, 0.5], np.float32), SIMILARITY_LEE, np.zeros(1))


@jax.jit
def selected(x_ND, live):
    routing = route(x_ND, WEIGHT_ED, BIAS_E, MOE)
    rows = jnp.arange(len(x_ND))
    context = policies.Context(jnp.int32(LAYER), rows, jnp.ones(len(x_ND), bool), 1)
    return routing, policies.select(routing, live, context, MOE, K)


def kept(selection):
    """{expert: weight} of each row."""
    rows = zip(*map(np.asarray, selection))
    return [{int(expert): float(weight) for expert, weight, keep in zip(*row) if keep} for row in rows]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2)])
def test_the_selection_is_that_of_one_device(mesh_of, sizes):
    architecture = tiny_model.layers_of(MOE, L)
    live = policies.settings([parse(spec, CALIBRATION) for spec in ROWS], architecture, K)
    routing, alone = selected(X_ND, live)
    in_groups = E * MOE.num_groups_kept // MOE.num_groups  # the others have no score
    assert np.diff(np.sort(routing.score_NE, axis=1)[:, -in_groups:]).min() > GAP
    mesh = mesh_of(sizes)
    on_all = jax.device_put(live, NamedSharding(mesh, P()))
    _, selection = selected(jax.device_put(X_ND, NamedSharding(mesh, P("data"))), on_all)
    for spec, on_mesh, expected in zip(ROWS, kept(selection), kept(alone), strict=True):
        assert on_mesh == pytest.approx(expected, abs=1e-6), spec


def test_every_kind_is_among_them_and_changes_something():
    assert {type(part) for spec in SPECS for part in parse(spec, CALIBRATION).parts} == set(KINDS)
    architecture = tiny_model.layers_of(MOE, L)
    _, own = selected(X_ND, policies.settings([parse("model")] * len(ROWS), architecture, K))
    live = policies.settings([parse(spec, CALIBRATION) for spec in ROWS], architecture, K)
    _, selection = selected(X_ND, live)
    changed = {spec for spec, row, other in zip(ROWS, kept(selection), kept(own)) if row != other}
    assert changed == {*SPECS} - {"model"}
