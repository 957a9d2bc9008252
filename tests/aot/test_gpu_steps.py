"""Whole steps of OLMoE-1B-7B through the real compiler for an H100, with the Hopper kernels inside.

Run as `test_gpu.py`.
"""

import jax
import pytest

from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.training.objective import objective
from tests.aot import whole_steps

pytestmark = pytest.mark.aot


@pytest.fixture(autouse=True)
def target():
    """Before any array is made: then it is too late to find the compiler."""
    whole_steps.compilers.device("h100")


@pytest.mark.parametrize("rows", [1, 64])
def test_decode_steps_copy_neither_weights_nor_cache(rows):
    """A layer of the cache of 64 rows has 537 MB, what is allowed 129."""
    program, _ = whole_steps.decode("h100", rows)
    assert "mosaic_gpu" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < whole_steps.most_temporaries("h100")


def test_prefill_copies_no_weights():
    """Beside sorted rows, gated rows and results, of each token k."""
    program, rows, hidden = whole_steps.prefill("h100", 2048)
    assert "mosaic_gpu" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * rows + hidden + whole_steps.most_temporaries("h100")


def test_gradient_of_a_training_step():
    layers, rows, length = 2, 1, 512
    how = whole_steps.execution("h100", layers)
    names = "tokens", "labels", "segments", "positions"
    packed = {f"{name}_BT": whole_steps.int32(rows, length) for name in names}

    def gradient(params, packed, live):
        def loss(params):
            return objective(params, packed, live, how, ObjectiveConfig(), 0.01)

        return jax.value_and_grad(loss, has_aux=True)(params)

    given = whole_steps.params_of(how), packed, whole_steps.live_of(rows, how).policy
    program = whole_steps.compilers.compiled("h100", gradient, *given)
    assert program.as_text().count("mosaic_gpu") >= 5  # gate and up, down, and their gradients
