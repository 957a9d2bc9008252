"""Whole steps through the real compiler for an H100, with the Hopper kernels inside, on one and on a node of eight.

Run as `test_gpu.py`.
"""

import jax
import pytest

from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.config.mesh import MeshConfig
from moe_jax.study import topologies
from moe_jax.study import whole_steps as steps
from moe_jax.training.objective import objective
from tests.aot import whole_steps

pytestmark = pytest.mark.aot
CHIP, NODE = "h100:1", "h100:8"


@pytest.fixture(autouse=True)
def target():
    """Before any array is made: then it is too late to find the compiler."""
    topologies.find(CHIP)
    topologies.find(NODE)


@pytest.mark.parametrize(("rows", "kernels"), [(1, 2), (8, 6)])
def test_decode_steps_copy_neither_weights_nor_cache(rows, kernels):
    """Not even the matrices of attention of one layer, 34 MB; of the cache of 8 rows a layer has 67 MB."""
    how = whole_steps.execution(CHIP)
    compiled = whole_steps.decode(CHIP, how, rows)
    assert compiled.kernels["mosaic_gpu"] == kernels  # two products of experts, and four projections
    assert compiled.temporary_bytes < whole_steps.attention_bytes(how)


def test_the_cache_of_many_rows_is_not_copied():
    """A layer of it has 537 MB, what is allowed 129."""
    how = whole_steps.execution(CHIP)
    assert whole_steps.decode(CHIP, how, rows=64).temporary_bytes < whole_steps.most_temporaries(how)


def test_prefill_copies_no_experts():
    """Beside sorted rows, gated rows and results, of each token k."""
    how = whole_steps.execution(CHIP)
    compiled = whole_steps.prefill(CHIP, how, 2048)
    assert compiled.kernels["mosaic_gpu"] == 2
    rows, hidden = whole_steps.slot_bytes(how, 2048)
    assert compiled.temporary_bytes < 2 * rows + hidden + whole_steps.most_temporaries(how)


def test_gradient_of_a_training_step():
    layers, rows, length = 2, 1, 512
    how = whole_steps.execution(CHIP, num_layers=layers)
    topology = topologies.find(CHIP)
    place = steps.place_of(how, topology)
    names = "tokens", "labels", "segments", "positions"
    packed = {f"{name}_BT": jax.ShapeDtypeStruct((rows, length), "int32", sharding=place) for name in names}

    def gradient(params, packed, live):
        def loss(params):
            return objective(params, packed, live, how, ObjectiveConfig(), 0.01)

        return jax.value_and_grad(loss, has_aux=True)(params)

    given = steps.params_of(how, topology, whole_steps.DTYPE), packed, steps.live_of(rows, how, place).policy
    program, _ = topology.compile(jax.jit(gradient).lower(*given))
    assert program.as_text().count("mosaic_gpu") >= 5  # gate and up, down, and their gradients


def test_a_decode_step_on_a_node_sends_only_rows():
    """With 8 rows a device, XLA takes the matrices of attention out of their stacks, one layer's at a time."""
    mesh = MeshConfig(data=8, expert_axes=("data", "expert"))
    how = whole_steps.execution(NODE, "olmoe_1b_7b", mesh, num_layers=2)
    compiled = whole_steps.decode(NODE, how, rows=64)
    assert compiled.kernels["mosaic_gpu"] == 2
    assert compiled.temporary_bytes < whole_steps.attention_bytes(how) + whole_steps.most_temporaries(how)
    rows = 64 * 2 * how.architecture.decoder.d_model
    assert 2 * 2 * 7 / 8 * rows <= compiled.sent_bytes < 4 * 2 * 7 / 8 * rows  # in and out, in each of two layers
