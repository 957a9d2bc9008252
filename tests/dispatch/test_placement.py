"""Placement: balanced on loads that it has not seen, whole groups on nodes, and the same results."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.api import dispatch
from moe_jax.dispatch.contract import Dispatch
from moe_jax.dispatch.placement import place, read_loads
from tests.dispatch import routed

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
HALVES = [read_loads(RESULTS / f"evaluate_demo_{half}" / "expert_load.csv") for half in ("even", "odd")]  # documents


def max_over_mean(placement, load_LE):
    load = placement.device_loads(load_LE)
    return load.max(axis=1) / load.mean(axis=1)


@pytest.mark.parametrize(("measured", "unseen"), [HALVES, HALVES[::-1]], ids=["even to odd", "odd to even"])
def test_half_of_the_demos_loads_balances_the_other(measured, unseen):
    """Measured on every second held-out document, on eight devices with eight replicas."""
    placement = place(measured, 8, replicas=8)
    assert placement.held_LE.shape == (5, 72)
    assert max_over_mean(placement, measured).max() <= 1.001
    assert max_over_mean(placement, unseen).max() <= 1.10


def test_a_placement_is_a_value():
    """It is a static part of compiled programs: made twice from the same loads, it is the same."""
    one, other = (place(HALVES[0], 8, replicas=8) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != place(HALVES[1], 8, replicas=8) and one != place(HALVES[0], 4, replicas=8)


@pytest.mark.parametrize("text", ["", "policy,moe_layer,0\n", "a,b,0\nmodel,0,1\n", "policy,moe_layer,0\nmodel,0,x\n"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "loads.csv").write_text(text)
    with pytest.raises(ValueError, match=r"mesh\.placement = .*loads\.csv': expected an expert_load\.csv"):
        read_loads(tmp_path / "loads.csv")


def test_hot_experts_are_copied_to_several_devices():
    load_LE = np.ones((1, 16))
    load_LE[0, 5] = 33  # the mean of four devices is 12
    assert max_over_mean(place(load_LE, 4), load_LE) > 2
    placement = place(load_LE, 4, replicas=4)
    assert max_over_mean(placement, load_LE) <= 1.2
    held = placement.held_LE[0].reshape(4, -1)
    assert all((own == 5).sum() <= 1 for own in held)
    assert set(held.reshape(-1)) == set(range(16))


def test_groups_stay_on_one_node():
    load_LE = np.random.default_rng(0).random((2, 32)) + 0.1
    placement = place(load_LE, 8, replicas=8, nodes=2, groups=4)
    for held_E in placement.held_LE:
        nodes = [set(own // 8) for own in held_E.reshape(2, -1)]
        assert nodes[0].isdisjoint(nodes[1])
        assert len(nodes[0]) == len(nodes[1]) == 2


def test_placed_experts_give_the_same_results():
    selection, x_ND, experts = routed.selection("dropped", 13), routed.tokens(13), routed.experts()
    selection = jax.tree.map(jnp.asarray, selection)
    load_LE = np.stack([np.bincount(selection.expert_NK.reshape(-1), minlength=16)] * 2)
    placement = place(load_LE, 4, replicas=4)
    held_E = placement.held_LE[1]
    placed = experts._replace(gate_up_LEIFD=experts.gate_up_LEIFD[:, held_E], down_LEDF=experts.down_LEDF[:, held_E])
    run = jax.jit(lambda *operands: dispatch(*operands, "blocked", Dispatch()))
    y_ND, counts = run(x_ND, placement.to_places(selection, experts.layer), placed)
    expected_ND = routed.expected(x_ND, selection, experts)
    assert np.linalg.norm(y_ND - expected_ND) <= 1e-5 * np.linalg.norm(expected_ND)
    kept = np.bincount(selection.expert_NK[selection.keep_NK], minlength=16)
    np.testing.assert_array_equal(placement.to_experts(counts.load_E, experts.layer), kept)


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (2, "18 experts and replicas: expected a multiple of 4"),
        (52, "52 replicas: expected at most 48, one on each device"),
    ],
)
def test_what_cannot_be_placed_is_refused(replicas, message):
    with pytest.raises(ValueError, match=message):
        place(np.ones((1, 16)), 4, replicas=replicas)
