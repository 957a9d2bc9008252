"""A model on a mesh computes what it computes on one device, and each device holds and reads its own part."""

import math
import re

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.checkpoint import filling, huggingface
from moe_jax.config.mesh import MeshConfig
from moe_jax.engine import steps

PROMPTS = [[3, 4, 5, 6, 7], [7, 8, 9], [30, 31]]
SPECS = ["model", "topk:3", "opportunistic:2"]
TOKENS_BT = np.random.default_rng(0).integers(0, 512, (5, 13))
WIDE, SLOW = pytest.mark.processes, pytest.mark.slow
BOTH = ("data", "expert")
MESHES = [
    pytest.param(MeshConfig(2, 2, 2), id="2x2x2"),
    pytest.param(MeshConfig(1, 8), id="1x8", marks=WIDE),
    pytest.param(MeshConfig(2, 4), id="2x4", marks=WIDE),
    pytest.param(MeshConfig(4, 2), id="4x2", marks=WIDE),
    pytest.param(MeshConfig(8, 1), id="8x1", marks=WIDE),
    pytest.param(MeshConfig(1, 2, 4), id="1x2x4", marks=WIDE),  # more parts than key and value heads
    pytest.param(MeshConfig(2, 2, 2, dispatch="all_to_all"), id="2x2x2 all_to_all"),
    pytest.param(MeshConfig(2, 4, dispatch="ragged"), id="2x4 ragged", marks=WIDE),
    pytest.param(MeshConfig(2, 4, expert_axes=BOTH), id="2x4 both", marks=WIDE),
    pytest.param(MeshConfig(2, 4, dispatch="all_gather"), id="2x4 all_gather", marks=SLOW),
    pytest.param(MeshConfig(4, 2, expert_axes=BOTH, dispatch="all_to_all"), id="4x2 all_to_all", marks=SLOW),
    pytest.param(MeshConfig(2, 2, 2, expert_axes=BOTH, dispatch="ragged"), id="2x2x2 ragged", marks=SLOW),
]


@pytest.fixture(scope="module")
def one(folder):
    """On one device: the model, its logits under each policy, and completions, one with each policy."""
    model = moe_jax.load(folder)
    logits = [model.logits(TOKENS_BT, policy=spec) for spec in SPECS]
    return model, logits, model.generate(PROMPTS, max_new_tokens=10, policy=SPECS)


def test_each_device_holds_its_experts_where_they_lie_over_two_axes(folder):
    experts = moe_jax.load(folder, mesh=MeshConfig(2, 4, expert_axes=BOTH)).params["moe"]["experts"]
    for stack, own in (("gate_up_LEIFD", (2, 2, 2, 24, 64)), ("down_LEDF", (2, 2, 64, 24))):
        assert experts[stack].sharding.shard_shape(experts[stack].shape) == own  # two of 16 experts


def test_experts_in_eight_bits_lie_and_run_as_arrays_do(folder):
    alone = moe_jax.load(folder, expert_dtype="int8").logits(TOKENS_BT, policy="topk:3")
    model = moe_jax.load(folder, mesh=MeshConfig(2, 2, 2), expert_dtype="int8")
    down = model.params["moe"]["experts"]["down_LEDF"]
    shards = [part.sharding.shard_shape(part.shape) for part in (down.values, down.scale)]
    assert shards == [(2, 8, 64, 12), (2, 8, 64, 1)]  # a scale covers all of F
    assert np.linalg.norm(model.logits(TOKENS_BT, policy="topk:3") - alone) < 1e-5 * np.linalg.norm(alone)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_and_greedy_text_are_those_of_one_device(one, folder, mesh):
    _, expected, completions = one
    model = moe_jax.load(folder, mesh=mesh)
    for spec, expected_BTV in zip(SPECS, expected):
        logits_BTV = model.logits(TOKENS_BT, policy=spec)
        assert np.linalg.norm(logits_BTV - expected_BTV) < 1e-5 * np.linalg.norm(expected_BTV), spec
    for on_mesh, alone in zip(model.generate(PROMPTS, max_new_tokens=10, policy=SPECS), completions):
        assert on_mesh.ids == alone.ids
        assert on_mesh.experts_per_token == alone.experts_per_token
        assert on_mesh.distinct_experts_per_layer_step == alone.distinct_experts_per_layer_step
    gathered = [size for program in decode_programs(model) for size in gathered_sizes(program.as_text())]
    assert max(gathered, default=0) < 16 * 64 * 24  # a layer's down-projections stay where they are


def decode_programs(model):
    return [program for key, program in model.engine._programs.items() if key[0] is steps.decode]


def gathered_sizes(text):
    """The number of elements of every array that an all-gather of a compiled program makes."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def test_the_policies_differ(one):
    """Otherwise equal sets on every mesh would prove nothing."""
    _, (full, few, together), _ = one
    assert np.abs(full - few).max() > 0.1 and np.abs(full - together).max() > 0.1


def test_each_device_holds_its_own_part_which_is_read_once(one, folder, mesh_of, monkeypatch):
    sources, fill = [], filling.fill
    monkeypatch.setattr(filling, "fill", lambda given: [sources.extend(given), fill(given)][1])
    params = dict(huggingface.flattened(moe_jax.load(folder, mesh=mesh_of((2, 2, 2))).params))
    expected = dict(huggingface.flattened(one[0].params))
    assert sum(source.destination.nbytes for source in sources) == sum(array.nbytes for array in expected.values())
    for path, array in params.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]))

    def own(path):
        return params[path].sharding.shard_shape(params[path].shape)

    assert own("moe/experts/gate_up_LEIFD") == (2, 8, 2, 12, 64)
    assert own("moe/experts/down_LEDF") == (2, 8, 64, 12)
    assert own("moe/attention/query_LHAD") == (2, 2, 16, 64)
    assert own("moe/attention/key_LGAD") == (2, 1, 16, 64)
    assert own("embedding_VD") == (256, 64)
    assert own("moe/router/weight_LED") == (2, 16, 64)
    assert own("norm_D") == (64,)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 1, 8), "mesh.tensor = 8: expected a divisor of the model's 4 query heads"),
        ((1, 3, 1), "mesh.expert = 3: expected a divisor of the model's 16 experts of a layer"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(folder, sizes, expected):
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    with pytest.raises(ValueError, match=expected):
        moe_jax.load(folder, mesh=jax.sharding.Mesh(devices, ("data", "expert", "tensor")))


def test_an_unknown_axis_is_refused(folder):
    with pytest.raises(ValueError, match="mesh has the axis 'model': expected axes among data, expert, tensor"):
        moe_jax.load(folder, mesh=jax.make_mesh((8,), ("model",)))
