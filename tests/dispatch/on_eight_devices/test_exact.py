"""Every dispatch on a mesh gives the outputs, counts and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.api import dispatch
from moe_jax.dispatch.contract import Dispatch, Experts
from moe_jax.kernels.quantized import DTYPES as EIGHT_BITS
from tests.dispatch import routed
from tests.kernels.eight_bits import random_weights

TOLERANCE = 1e-5  # of the norm
TOKENS = 13  # no mesh divides it
NAMES = ("replicated", "all_gather", "all_to_all", "ragged")
MESHES = ((1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2))
DEFAULT = [
    ((1, 8, 1), ("expert",), "all_to_all"),
    ((8, 1, 1), ("expert",), "local"),
    ((2, 2, 2), ("data", "expert"), "ragged"),
    *(((2, 4, 1), ("expert",), name) for name in NAMES),
    ((2, 2, 2), ("expert",), "all_gather"),
    ((2, 2, 2), ("expert",), "all_to_all"),
]
EVERY = [(mesh, axes, name) for mesh in MESHES for axes in (("expert",), ("data", "expert")) for name in NAMES]


def program(how, kernel="blocked"):
    """(x_ND, selection, experts) -> y_ND, counts, and the gradients of x, mixing weights and experts."""

    def loss(x_ND, weight_NK, gate_up, down, selection, layer):
        chosen = selection._replace(weight_NK=jnp.where(selection.keep_NK, weight_NK, 0))
        y_ND, counts = dispatch(x_ND, chosen, Experts(gate_up, down, layer), kernel, how)
        return (y_ND * jnp.cos(jnp.arange(y_ND.size)).reshape(y_ND.shape)).sum(), (y_ND, counts)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))

    def run(x_ND, selection, experts):
        (_, (y_ND, counts)), grads = compiled(x_ND, selection.weight_NK, *experts[:2], selection, experts.layer)
        return y_ND, counts, grads

    return run


@functools.cache
def on_one_device(load):
    x_ND, selection, experts = routed.tokens(TOKENS), routed.selection(load, TOKENS), routed.experts()
    return program(Dispatch())(x_ND, selection, experts)


def assert_same(case, one, other):
    difference, norm = np.linalg.norm(np.subtract(one, other)), np.linalg.norm(other)
    assert difference <= TOLERANCE * norm, (case, difference, norm)


def compare(mesh, axes, name):
    run = program(Dispatch(name, mesh, axes))
    for load in routed.LOADS:
        x_ND, selection, experts = routed.tokens(TOKENS), routed.selection(load, TOKENS), routed.experts()
        y_ND, counts, grads = run(x_ND, selection, experts)
        one_ND, one_counts, one_grads = on_one_device(load)
        assert_same((load, "y"), y_ND, routed.expected(x_ND, selection, experts))
        for part, grad, one_grad in zip(("x", "mixing", "gate_up", "down"), grads, one_grads):
            assert_same((load, part), grad, one_grad)
        assert_same((load, "y"), one_ND, y_ND)
        np.testing.assert_array_equal(counts.load_E, one_counts.load_E)
        kept = selection.keep_NK.sum()
        assert (counts.load_E.sum(), counts.overflow) == (kept, 0)
        if name == "ragged":
            assert counts.sent <= kept


@pytest.mark.parametrize(("sizes", "axes", "name"), DEFAULT)
def test_dispatch(mesh_of, sizes, axes, name):
    compare(mesh_of(sizes), axes, name)


@pytest.mark.parametrize(
    ("sizes", "axes", "name", "dtype"),
    [
        ((2, 2, 2), ("expert",), "replicated", "int8"),
        ((2, 2, 2), ("data", "expert"), "all_gather", "float8_e4m3fn"),
        ((1, 8, 1), ("expert",), "all_to_all", "int8"),
        ((2, 2, 2), ("data", "expert"), "ragged", "float8_e4m3fn"),
        ((8, 1, 1), ("expert",), "local", "int8"),
    ],
)
def test_experts_in_eight_bits(mesh_of, sizes, axes, name, dtype):
    """A tensor axis of 2 splits blocks of 2 x 8 along F; a scale of int8 covers all of F, and is on both devices."""
    assert dtype in EIGHT_BITS
    shape, blocks = (routed.LAYERS, routed.EXPERTS), (None, None) if dtype == "int8" else ((2, 8), (8, 2))
    gate_up, wide_gate_up = random_weights((*shape, 2, routed.F, routed.D), dtype, blocks[0])
    down, wide_down = random_weights((*shape, routed.D, routed.F), dtype, blocks[1], seed=1)
    x_ND, selection = routed.tokens(TOKENS), routed.selection("dropped", TOKENS)
    how = Dispatch(name, mesh_of(sizes), axes)
    y_ND, counts = jax.jit(functools.partial(dispatch, kernel="blocked", how=how))(
        x_ND, selection, Experts(gate_up, down, jnp.int32(1))
    )
    assert_same((name, dtype), y_ND, routed.expected(x_ND, selection, Experts(wide_gate_up, wide_down, 1)))
    assert counts.load_E.sum() == selection.keep_NK.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "axes", "name"), [case for case in EVERY if case not in DEFAULT])
def test_dispatch_on_every_mesh(mesh_of, sizes, axes, name):
    compare(mesh_of(sizes), axes, name)
