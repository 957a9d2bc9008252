"""A product with one layer of a stack: every implementation against the plain loop, and the gradient of `xla`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.projection import pallas_gpu, reference, xla
from moe_jax.kernels.projection.api import IMPLEMENTATIONS, projection

# largest difference over the largest value of the reference
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
# shape of x, shape of one layer, number of contracted axes
CASES = {
    "one_row": ((1, 24), (40, 24), 1),
    "to_heads": ((2, 3, 24), (4, 5, 24), 1),
    "from_heads": ((2, 3, 4, 5), (24, 4, 5), 2),
    "gate_and_up": ((33, 24), (2, 20, 24), 1),
    "no_rows": ((0, 24), (40, 24), 1),
}
LAYERS = 3


def random_inputs(case, dtype, stack_dtype=None):
    x, layer, contracted = CASES[case]
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((LAYERS, *layer))
    return jnp.asarray(rng.standard_normal(x), dtype), jnp.asarray(stack, stack_dtype or dtype), contracted


def run(x, stack, layer, contracted, dtype, implementation):
    return jax.jit(projection, static_argnums=(3, 4, 5))(x, stack, layer, contracted, dtype, implementation)


def assert_close(got, expected, dtype):
    assert got.shape == expected.shape
    scale = np.abs(expected).max(initial=0)
    assert np.abs(np.asarray(got, np.float64) - expected).max(initial=0) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward(implementation, case, dtype):
    x, stack, contracted = random_inputs(case, dtype)
    for layer in (0, 2):
        expected = reference.forward(x, stack, layer, contracted)
        for out_dtype in (dtype, "float32"):
            got = run(x, stack, layer, contracted, jnp.dtype(out_dtype), implementation)
            assert got.dtype == out_dtype
            assert_close(got, expected, out_dtype if dtype == "float32" else dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_wider_stack_is_not_rounded(implementation):
    x, stack, contracted = random_inputs("to_heads", "bfloat16", "float32")
    got = run(x, stack, 1, contracted, jnp.dtype("float32"), implementation)
    assert_close(got, reference.forward(x, stack, 1, contracted), "float32")


HOPPER_CASES = {
    "to_heads": ((2, 1, 128), (3, 64, 128), 1),
    "from_heads": ((9, 1, 2, 64), (192, 2, 64), 2),
    "gate_and_up": ((64, 64), (2, 64, 64), 1),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel asks for jax 0.11")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_few_rows_on_a_hopper_gpu(case, dtype, monkeypatch):
    """Interpreted. The other layers are NaN, which would spread."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setitem(CASES, case, HOPPER_CASES[case])
    x, stack, contracted = random_inputs(case, dtype)
    expected = reference.forward(x, stack, 1, contracted)
    stack = stack.at[0].set(jnp.nan).at[2].set(jnp.nan)
    monkeypatch.setattr(xla, "forward", None)
    with plgpu.force_gpu_interpret_mode():
        assert_close(run(x, stack, jnp.int32(1), contracted, x.dtype, "pallas_gpu"), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_on_a_gpu(case, monkeypatch):
    monkeypatch.setitem(CASES, case, HOPPER_CASES[case])
    monkeypatch.setattr(xla, "forward", None)
    x, stack, contracted = random_inputs(case, "bfloat16")
    got = run(x, stack, jnp.int32(1), contracted, x.dtype, "pallas_gpu")
    assert_close(got, reference.forward(x, stack, 1, contracted), "bfloat16")


@pytest.mark.parametrize(
    ("x", "layer", "dtype", "out_dtype"),
    [
        ((1, 64), (64, 64), "bfloat16", "bfloat16"),
        ((65, 64), (64, 64), "bfloat16", "bfloat16"),
        ((8, 64), (64, 64), "bfloat16", "float32"),
        ((8, 64), (64, 64), "float32", "bfloat16"),
        ((8, 64), (96, 64), "float16", "float16"),
    ],
)
def test_other_products_on_a_hopper_gpu_are_those_of_xla(x, layer, dtype, out_dtype, monkeypatch):
    taken = []
    monkeypatch.setattr(xla, "forward", lambda *operands: taken.append(operands))
    pallas_gpu.forward(jnp.zeros(x, dtype), jnp.zeros((2, *layer), dtype), 1, 1, jnp.dtype(out_dtype))
    assert len(taken) == 1


def test_gradient():
    x, stack, contracted = random_inputs("to_heads", "float32")
    out_grad = np.random.default_rng(1).standard_normal((2, 3, 4, 5))

    def loss(x, stack):
        return (projection(x, stack, 1, contracted, x.dtype, "xla") * out_grad).sum()

    x_grad, stack_grad = jax.grad(loss, (0, 1))(x, stack)
    assert_close(x_grad, np.einsum("btha,had->btd", out_grad, np.asarray(stack[1], np.float64)), "float32")
    assert_close(stack_grad[1], np.einsum("btha,btd->had", out_grad, np.asarray(x, np.float64)), "float32")
    assert not stack_grad[0].any() and not stack_grad[2].any()
