"""Whole steps through the real compiler for TPUs, with our kernels inside, and no copies of weights or cache.

Run as `test_tpu.py`. On one v5p, temporaries of OLMoE-1B-7B stay below the 268 MB that one layer's down-projections
take. DeepSeek-V3's shape runs with four of its layers, on two slices.
"""

import pytest

from moe_jax.config.mesh import MeshConfig
from moe_jax.cost import parallel
from tests.aot import whole_steps

pytestmark = pytest.mark.aot
CHIP = "v5p:1x1x1"
OF_EXPERTS = {"grouped_matmul_gated", "grouped_matmul"}
PREFILL = "splash_mha_fwd_no_residuals"
SLICE, MESH = "v5p:2x2x4", MeshConfig(data=8, tensor=2, expert_axes=("data", "expert"))


@pytest.mark.parametrize("rows", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_a_decode_step_copies_neither_experts_nor_cache(rows):
    how = whole_steps.execution(CHIP)
    compiled = whole_steps.decode(CHIP, how, rows)
    assert compiled.kernels.keys() == OF_EXPERTS
    assert compiled.temporary_bytes < whole_steps.most_temporaries(how) < compiled.cache_bytes / rows * 64


@pytest.mark.slow
def test_prefill_copies_no_experts():
    """Beside sorted rows, gated rows, results, and results in the order of tokens."""
    how = whole_steps.execution(CHIP)
    compiled = whole_steps.prefill(CHIP, how, tokens=2048)
    assert compiled.kernels.keys() == {*OF_EXPERTS, PREFILL}
    rows, hidden = whole_steps.slot_bytes(how, 2048)
    assert compiled.temporary_bytes < 3 * rows + hidden + whole_steps.most_temporaries(how)


def test_a_decode_step_on_a_slice_copies_neither_weights_nor_all_latents():
    """Beside scores and rows as in prefills: the latents of one layer at a time, which vector memory holds."""
    how = whole_steps.execution(SLICE, "deepseek_v3", MESH, num_layers=4)
    compiled = whole_steps.decode(SLICE, how, rows=64, positions=4096)
    assert compiled.kernels.keys() == OF_EXPERTS
    assert compiled.weight_bytes == parallel.weight_bytes(how.architecture, how.layout, 2)
    assert compiled.cache_bytes == 2 * 4 * (64 // 8) * 4096 * 640  # L, B of a device, M, channels with padding
    latents, scores = compiled.cache_bytes / 4, 4 * (64 // 8) * (128 // 2) * 4096
    slots, hidden = whole_steps.slot_bytes(how, 64)  # hidden: of both halves
    allowed = latents + scores + 3 * slots + hidden / 2 + whole_steps.most_temporaries(how)
    assert compiled.temporary_bytes < allowed < compiled.cache_bytes


def test_a_decode_step_on_a_slice_sends_what_is_counted():
    how = whole_steps.execution(SLICE, "deepseek_v3", MESH, num_layers=4)
    compiled = whole_steps.decode(SLICE, how, rows=64, positions=4096)
    counted = parallel.share(how, parallel.StepShape(64, 1, 4095, 8), 2)
    layers = [one for one in compiled.collectives if one.name in ("all-reduce", "all-gather") and one.array_bytes > 1e5]
    assert sum(one.times * one.sent_bytes for one in layers) == pytest.approx(counted.sent_bytes, rel=0.1)


@pytest.mark.slow
def test_prefill_on_a_slice_runs_attention_on_its_own_heads():
    topology, mesh = "v5p:2x2x1", MeshConfig(data=2, tensor=2, expert_axes=("data", "expert"))
    how = whole_steps.execution(topology, "deepseek_v3", mesh, num_layers=4)
    compiled = whole_steps.prefill(topology, how, tokens=512, rows=2)
    assert compiled.kernels.keys() == {*OF_EXPERTS, PREFILL}
    rows, hidden = whole_steps.slot_bytes(how, 1024)
    assert compiled.temporary_bytes < 3 * rows + hidden + whole_steps.most_temporaries(how)
