"""Whole steps of OLMoE-1B-7B through the real compiler for a v5p, with the TPU kernels inside.

Run as `test_tpu.py`. Temporaries stay below the 268 MB that one layer's down-projections take, so no program copies the
experts of a layer.
"""

import pytest

from tests.aot import whole_steps

pytestmark = pytest.mark.aot
CHIP = "v5p"
OF_EXPERTS = {"grouped_matmul_gated", "grouped_matmul"}


def kernels(program):
    return {name for name, _ in whole_steps.compilers.mosaic_kernels(program)}


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


def test_a_decode_step_copies_neither_experts_nor_cache():
    program, _ = whole_steps.decode(CHIP, rows=1)
    assert kernels(program) == OF_EXPERTS
    assert temporary_bytes(program) < whole_steps.most_temporaries(CHIP)


@pytest.mark.slow
def test_a_decode_step_of_many_rows_copies_neither_experts_nor_cache():
    """Beside the output projections of all layers, which XLA lays out in another way once for all steps of a call."""
    program, layer_cache = whole_steps.decode(CHIP, rows=64)
    assert kernels(program) == OF_EXPERTS
    how = whole_steps.execution(CHIP)
    projections = 2 * whole_steps.params_of(how)["moe"]["attention"]["output_LDHA"].size
    assert temporary_bytes(program) < projections + whole_steps.most_temporaries(CHIP) < layer_cache


@pytest.mark.slow
def test_prefill_copies_no_experts():
    """Beside sorted rows, gated rows, results, and results in the order of tokens."""
    program, rows, hidden = whole_steps.prefill(CHIP, tokens=2048)
    assert kernels(program) == {*OF_EXPERTS, "splash_mha_fwd_no_residuals"}
    assert temporary_bytes(program) < 3 * rows + hidden + whole_steps.most_temporaries(CHIP)
