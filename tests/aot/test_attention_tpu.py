"""Attention through the real TPU compiler, for TPUs that are not there (`requirements-aot.txt` brings it)."""

import pytest

from tests import launcher_module
from tests.aot import cached

matrix = launcher_module.import_launcher("compile_matrix", "benchmarks")
pytestmark = pytest.mark.aot
IN_CI = {("olmoe_1b_7b", "8192"), ("qwen3_30b_a3b", "2048 of 8192"), ("deepseek_v2_lite", "2048")}


def cases():
    for chip in matrix.compilers.TPUS:
        for model in matrix.HEADS:
            for length in matrix.LENGTHS:
                marks = () if (model, length) in IN_CI else (pytest.mark.slow,)
                yield pytest.param(chip, model, length, marks=marks, id=f"{chip}-{model}-{length}")


@pytest.mark.parametrize("work", matrix.ATTENTION)
@pytest.mark.parametrize(("chip", "model", "length"), list(cases()))
def test_values_and_gradients_compile_and_keep_no_scores(chip, model, length, work):
    outcome = matrix.compile_case(matrix.CompileCase(chip, model, length, work))
    assert outcome.problem == ""
    assert {name.split("_")[2] for name in outcome.kernels} == {"fwd", "dq", "dkv"}


@pytest.mark.parametrize("model", ["olmoe_1b_7b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("chip", matrix.compilers.TPUS)
def test_decoding_copies_at_most_a_layer_of_the_cache(chip, model):
    """And nothing where no heads share keys, except for a TPU7x."""
    most = 0.1 if model == "olmoe_1b_7b" and chip != "tpu7x" else 1.01
    assert cached.temporaries(chip, matrix.HEADS[model], rows=64, positions=1024) < most
