"""The experts' feed-forward against the plain loop: every implementation, and the gated forms, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.expert_ffn import reference
from moe_jax.kernels.expert_ffn.api import GATED, expert_ffn
from moe_jax.kernels.grouped_matmul import pallas_gpu
from moe_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS, takes
from moe_jax.kernels.quantized import DTYPES as EIGHT_BITS
from tests.kernels.eight_bits import random_weights

# largest difference over the largest value of the reference
TOLERANCE = {"float32": 4e-6, "bfloat16": 1.6e-2}
# rows, group sizes
CASES = {
    "even": (64, [16, 16, 16, 16]),
    "skewed": (101, [1, 80, 3, 17]),
    "empty_groups": (40, [0, 25, 0, 15]),
    "one_expert": (33, [0, 0, 33, 0]),
    "dropped_rows": (64, [5, 0, 20, 9]),
    "nothing_kept": (16, [0, 0, 0, 0]),
}
ON_A_CPU = [name for name in IMPLEMENTATIONS if name not in GATED]
LAYERS, D, F = 2, 64, 128  # widths that the Hopper kernels take


def random_case(case, dtype):
    num_rows, sizes = CASES[case]
    rng = np.random.default_rng(0)
    shapes = (num_rows, D), (LAYERS, len(sizes), 2, F, D), (LAYERS, len(sizes), D, F), (num_rows, D)
    scales = 1, D**-0.5, F**-0.5, 1
    arrays = [jnp.asarray(rng.standard_normal(shape) * scale, dtype) for shape, scale in zip(shapes, scales)]
    return arrays, jnp.asarray(sizes, jnp.int32)


def assert_close(got, expected, dtype):
    scale = np.abs(expected).max(initial=0)
    assert np.abs(np.asarray(got, np.float64) - expected).max(initial=0) <= TOLERANCE[dtype] * scale


def compare_with_the_loop(implementation, case, dtype):
    (rows, gate_up, down, out_grad), sizes = random_case(case, dtype)

    def run(rows, gate_up, down):
        return expert_ffn(rows, gate_up, down, sizes, jnp.int32(1), implementation)

    got = jax.jit(run)(rows, gate_up, down)
    assert got.dtype == rows.dtype
    assert_close(got, reference.forward(rows, gate_up, down, sizes, 1), dtype)
    gradients = jax.jit(lambda *inputs: jax.vjp(run, *inputs)[1](out_grad))(rows, gate_up, down)
    for got, expected in zip(gradients, reference.backward(rows, gate_up, down, sizes, 1, out_grad), strict=True):
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ON_A_CPU)
def test_forward_and_gradients(implementation, case, dtype):
    compare_with_the_loop(implementation, case, dtype)


def compare_in_eight_bits(implementation, case, weights_dtype, dtype, widths=(D, F), block=None):
    d_model, hidden = widths
    num_rows, sizes = CASES[case]
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((num_rows, d_model)), dtype)
    sizes = jnp.asarray(sizes, jnp.int32)
    gate_up, wide_gate_up = random_weights((LAYERS, len(sizes), 2, hidden, d_model), weights_dtype, block)
    down, wide_down = random_weights((LAYERS, len(sizes), d_model, hidden), weights_dtype, block, seed=1)
    gate_up.scale, wide_gate_up = gate_up.scale * d_model**-0.5, wide_gate_up * d_model**-0.5
    got = jax.jit(lambda *inputs: expert_ffn(*inputs, sizes, jnp.int32(1), implementation))(rows, gate_up, down)
    assert got.dtype == rows.dtype
    assert_close(got, reference.forward(rows, wide_gate_up, wide_down, sizes, 1), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weights_dtype", EIGHT_BITS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", [name for name in ON_A_CPU if takes(name, "int8")])
def test_in_eight_bits(implementation, case, weights_dtype, dtype):
    compare_in_eight_bits(implementation, case, weights_dtype, dtype)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels ask for jax 0.11")
def test_gated_on_hopper_kernels(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(pallas_gpu, "NUM_CORES", 2)
    with plgpu.force_gpu_interpret_mode():
        compare_with_the_loop("pallas_gpu", "dropped_rows", "bfloat16")


@pytest.mark.parametrize(("case", "dtype"), [("skewed", "bfloat16"), ("dropped_rows", "float32")])
def test_gated_on_tpu_kernels(case, dtype):
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        compare_with_the_loop("pallas_tpu", case, dtype)


@pytest.mark.parametrize("weights_dtype", EIGHT_BITS)
@pytest.mark.parametrize(("case", "dtype"), [("skewed", "bfloat16"), ("dropped_rows", "float32")])
def test_in_eight_bits_on_tpu_kernels(case, dtype, weights_dtype):
    from jax.experimental.pallas import tpu as pltpu

    block = (128, 128) if weights_dtype == "float8_e4m3fn" else None
    with pltpu.force_tpu_interpret_mode():
        compare_in_eight_bits("pallas_tpu", case, weights_dtype, dtype, (384, 256), block)


def test_blocks_of_more_outputs_than_are_multiplied_at_once_on_tpu_kernels():
    """A pass has 768 columns, 256 of them at once: the second 256 lie in two blocks of 384."""
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        compare_in_eight_bits("pallas_tpu", "skewed", "float8_e4m3fn", "float32", (384, 1536), (384, 128))


def test_weights_may_be_wider_than_rows():
    (rows, gate_up, down, _), sizes = random_case("skewed", "float32")
    got = expert_ffn(rows.astype(jnp.bfloat16), gate_up, down, sizes, 1, "blocked")
    assert got.dtype == jnp.bfloat16
    assert_close(got, reference.forward(rows.astype(jnp.bfloat16), gate_up, down, sizes, 1), "bfloat16")
