"""The compiled decode step of a whole model leaves its experts where they are."""

import dataclasses
import math
import re

import pytest

import moe_jax
from moe_jax.config.mesh import MeshConfig
from moe_jax.config.schema import SamplingConfig
from moe_jax.cost.collectives import collectives
from moe_jax.engine.batch import live_of
from moe_jax.engine.request import make_requests
from tests import tiny_model

HIDDEN = 512  # of an expert, so that a layer's experts are larger than anything else
LARGE = tiny_model.changed(moe={"expert_hidden": HIDDEN, "num_experts": 32})
EXPERT = 3 * HIDDEN * LARGE.decoder.d_model  # numbers
NO_NEW_ARRAY = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "conditional",
    "call",
    "bitcast",
    "optimization-barrier",
)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("large") / "model", LARGE)


def made(text):
    """The operations of a compiled program that make an array, each with the numbers of its result."""
    for shape, name in re.findall(
        r"^\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]*)\]\S* ([a-z][a-z0-9-]*)\(", text, re.MULTILINE
    ):
        if name not in NO_NEW_ARRAY:
            yield math.prod(map(int, filter(None, shape.split(",")))), name


def decode_program(model, **kernels):
    execution = model._execution(0)
    execution = dataclasses.replace(execution, kernels=execution.kernels._replace(**kernels))
    requests = make_requests([[3, 4, 5]] * 4, model.tokenizer, execution, sampling=SamplingConfig(4))
    slots, live = model.engine.empty(4, 16, execution), live_of(requests, 4, execution)
    return model.engine.decode_program(slots, live, execution)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(1, 8), id="1x8 replicated"),
        pytest.param(MeshConfig(2, 2, 2, dispatch="all_to_all"), id="2x2x2 all_to_all", marks=pytest.mark.processes),
        pytest.param(MeshConfig(2, 4, dispatch="ragged"), id="2x4 ragged", marks=pytest.mark.processes),
    ],
)
def test_no_experts_are_gathered_or_copied(large, mesh):
    program = decode_program(moe_jax.load(large, mesh=mesh))
    experts = LARGE.moe.num_experts * EXPERT // (mesh.expert * mesh.tensor)  # of one layer, on one device
    largest, name = max(made(program.as_text()))
    assert 0 < largest < experts // 3, name  # a layer's down-projections
    assert [one for one in collectives(program.as_text()) if one.array_bytes >= 4 * EXPERT // 3] == []
    assert program.memory_analysis().temp_size_in_bytes < 4 * experts


@pytest.mark.parametrize("as_on", ["sums", "matmul"])
def test_the_cache_as_gpus_and_tpus_read_it_is_not_gathered(large, as_on):
    model, sent = moe_jax.load(large, mesh=MeshConfig(2, 2, 2)), []
    for name in ("xla", as_on):
        found = collectives(decode_program(model, cached_attention=name).as_text())
        sent.append(sum(one.times * one.sent_bytes for one in found))
    assert 0 < sent[1] <= sent[0]
