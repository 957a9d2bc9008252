"""The choice of a dispatch: the cheapest by what is sent, at every number of tokens; a name that cannot run is refused.

What `sent` counts is compared with compiled programs in `on_eight_devices/test_sent.py`.
"""

import dataclasses
import math

import pytest
from jax.sharding import AbstractMesh

from moe_jax.dispatch.choose import START_BYTES, choose, sent
from moe_jax.dispatch.contract import Dispatch

BYTES = 4096  # of a token: 2048 numbers of 16 bits
BOTH = ("data", "expert")


def how_of(sizes, axes=("expert",), **settings):
    return Dispatch(mesh=AbstractMesh(sizes, ("data", "expert", "tensor")), expert_axes=axes, **settings)


@pytest.mark.parametrize(
    ("how", "k", "platform", "training", "expected"),
    [
        (how_of((1, 8, 1)), 8, "gpu", False, "replicated"),  # 2 x 7/8 rows; an exchange alone has 2 x 8 / 8 x 7/8
        (how_of((1, 8, 1)), 8, "tpu", True, "replicated"),
        (how_of((1, 64, 1)), 8, "tpu", False, "replicated, from 1388 tokens ragged"),  # 4 MiB / 0.738 rows
        (how_of((64, 1, 1), BOTH), 8, "gpu", False, "replicated, from 548 tokens all_to_all"),
        (how_of((1, 8, 1), capacity=1.0, drop=True), 2, "gpu", False, "replicated, from 2341 tokens all_to_all"),
        (how_of((8, 1, 1)), 8, "gpu", False, "local"),
        (how_of((1, 1, 8)), 8, "gpu", False, "replicated"),  # the sum of tensor parallelism
        (how_of((8, 8, 1), BOTH), 8, "tpu", False, "replicated, from 309 tokens ragged"),
    ],
)
def test_the_choice_by_mesh_rows_and_phase(how, k, platform, training, expected):
    assert choose(how, "auto", k, BYTES, platform, training).name == expected


@pytest.mark.parametrize("how", [how_of((2, 16, 1)), how_of((16, 2, 2), BOTH), how_of((1, 32, 1), drop=True)])
@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("training", [False, True])
def test_no_other_candidate_is_cheaper_at_any_number_of_tokens(how, k, training):
    choice = choose(how, "auto", k, BYTES, "tpu", training)
    groups = math.prod(how.mesh.shape[axis] for axis in how.other_axes)
    for tokens in (1, 64, 500, 1000, 3000, 10_000, 100_000, 1_000_000):

        def cost(name, tokens=tokens):
            collectives, rows = sent(name, k, how, training)
            return START_BYTES * collectives + rows * BYTES * tokens / groups

        best = min(map(cost, ("replicated", "all_gather", "all_to_all", "ragged")))
        assert cost(choice.of(tokens).name) == pytest.approx(best)
        assert choice.of(tokens) == dataclasses.replace(how, name=choice.of(tokens).name)


def test_a_named_dispatch_is_used_for_all_steps():
    choice = choose(how_of((1, 64, 1)), "all_to_all", 8, BYTES, "tpu")
    assert choice.name == "all_to_all" and {choice.of(tokens).name for tokens in (1, 10**6)} == {"all_to_all"}


@pytest.mark.parametrize(
    ("how", "name", "expected"),
    [
        (how_of((1, 8, 1)), "alltoall", "mesh.dispatch = 'alltoall': expected auto or one of local, replicated"),
        (how_of((1, 8, 1)), "local", "expected all experts on each device, got 8 parts of them"),
        (how_of((1, 8, 1), drop=True), "replicated", "has no capacity: expected mesh.capacity = 0, or one of all_to"),
    ],
)
def test_a_name_that_cannot_run_is_refused(how, name, expected):
    with pytest.raises(ValueError, match=expected):
        choose(how, name, 8, BYTES, "cpu")


@pytest.mark.parametrize(("capacity", "name", "drops"), [(0, "auto", False), (1, "ragged", True), (1, "auto", True)])
def test_slots_are_dropped_with_a_capacity_alone(capacity, name, drops):
    how = how_of((1, 64, 1), **({"capacity": capacity, "drop": True} if capacity else {}))
    assert choose(how, name, 8, BYTES, "tpu").drops == drops
