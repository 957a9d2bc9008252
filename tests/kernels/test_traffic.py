"""The counter of traffic against grids counted by hand; and the bytes that the TPU kernels move, against the least."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels import quantized, traffic
from moe_jax.kernels.grouped_matmul import pallas_tpu
from tests import launcher_module

benchmark = launcher_module.import_launcher("traffic", "benchmarks")
DECODE, PREFILL = (1, 8, 64, 512), (2048, 8192)
FORWARD = ("gate_up", "gated", "down")
MOST = {"decode": 1.05, "prefill": 1.25}  # over the least bytes


@functools.cache
def case(model, tokens):
    """Sizes of the experts' groups, and the products."""
    experts = benchmark.experts_of(model)
    sizes = benchmark.draw_sizes(experts, tokens)
    return sizes, benchmark.products(experts, int(sizes.sum()))


@functools.cache
def moved(model, tokens, name, num_cores):
    sizes, products = case(model, tokens)
    return benchmark.count(products[name], sizes, num_cores)


def test_blocks_are_counted_when_their_index_changes():
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2, 3),
        in_specs=[
            pl.BlockSpec((8, 128), lambda i, j, expert_J: (i, 0)),  # 2 blocks, the second cut off at 12 rows
            pl.BlockSpec((None, 8, 128), lambda i, j, expert_J: (expert_J[j], 0, 0)),  # 5, 5, 2, then the same
        ],
        out_specs=pl.BlockSpec((8, 128), lambda i, j, expert_J: (0, i)),
    )
    operands = [np.zeros((12, 128), np.float32), np.zeros((6, 8, 128), jnp.bfloat16)]
    out = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    steps = jnp.asarray([5, 5, 2])
    counted = traffic.count(grid_spec, [steps], operands, [out])
    assert counted == traffic.Traffic((12 * 128 * 4, 4 * 8 * 128 * 2), (2 * 8 * 128 * 4,))
    assert counted.total == 12 * 128 * 4 + 4 * 8 * 128 * 2 + 2 * 8 * 128 * 4
    same = traffic.count(grid_spec, [jnp.asarray([3, 3, 3])], operands, [out])
    assert same.fetched[1] == 8 * 128 * 2
    halves = traffic.count(grid_spec, [jnp.asarray([3, 3, 3])], operands, [out], num_cores=2)
    assert halves.fetched == (12 * 128 * 4, 2 * 8 * 128 * 2)
    with pytest.raises(ValueError, match="expected 2 operands and 1 outputs, got 1, 1"):
        traffic.count(grid_spec, [steps], operands[:1], [out])


@pytest.mark.parametrize("tokens", DECODE)
@pytest.mark.parametrize("model", benchmark.MODELS)
def test_decoding_moves_little_more_than_each_expert_once(model, tokens):
    sizes, products = case(model, tokens)
    for name in FORWARD:
        for num_cores in (1, 2):
            counted = moved(model, tokens, name, num_cores)
            assert counted.total <= MOST["decode"] * products[name].least_bytes(sizes), (name, num_cores)
            assert counted.fetched[1] == 2 * (sizes > 0).sum() * np.prod(products[name].matrices)


@pytest.mark.parametrize("expert_dtype", quantized.DTYPES)
@pytest.mark.parametrize("tokens", (1, 64))
@pytest.mark.parametrize("model", benchmark.MODELS)
def test_weights_in_eight_bits_move_half_the_bytes(model, tokens, expert_dtype):
    sizes, products = case(model, tokens)
    for name in ("gated", "down"):
        product, wide = products[name], moved(model, tokens, name, 2)
        counted = benchmark.count(product, sizes, 2, expert_dtype)
        assert counted.fetched[1] == (sizes > 0).sum() * np.prod(product.matrices) == wide.fetched[1] / 2
        assert counted.fetched[2] <= 0.01 * counted.fetched[1]  # scales
        rows_bytes = sum(2 * np.prod(rows) for rows in (product.rows, product.other_rows))
        assert counted.total <= MOST["decode"] * (counted.fetched[1] + rows_bytes)


@pytest.mark.parametrize("tokens", PREFILL)
@pytest.mark.parametrize("model", benchmark.MODELS)
def test_prefill_and_gradients_move_little_more_or_are_bound_by_arithmetic(model, tokens):
    sizes, products = case(model, tokens)
    for chip_name, chip in benchmark.CHIPS.items():
        for name, product in products.items():
            total = moved(model, tokens, name, chip.num_cores).total
            by_arithmetic = total / chip.bytes_per_s <= product.flops / chip.bf16_flops_per_s
            assert by_arithmetic or total <= MOST["prefill"] * product.least_bytes(sizes), (name, chip_name)


@pytest.mark.parametrize("tokens", (1, 512))
@pytest.mark.parametrize("model", benchmark.MODELS)
def test_megablox_moves_no_less(model, tokens):
    sizes, products = case(model, tokens)
    for name in products.keys() - {"gated"}:
        for num_cores in (1, 2):
            ours = moved(model, tokens, name, num_cores).total
            megablox = benchmark.count_megablox(products[name], sizes, benchmark.TILINGS[1], num_cores).total
            assert ours <= megablox, (name, num_cores)
            if megablox > MOST["decode"] * products[name].least_bytes(sizes) and num_cores == 1:
                assert ours < megablox, (name, num_cores)


def test_megablox_as_counted_by_hand():
    """64 visits of two blocks of columns: rows are fetched at each step, and weights change with the group."""
    sizes = np.full(64, 32, np.int32)  # 4 groups in each block of 128 rows
    product = benchmark.Product((2048, 512), (2048, 256), (1, 256, 512))
    counted = benchmark.count_megablox(product, sizes, (128, 128, 128), 1)
    assert counted.fetched == (2 * 64 * 128 * 512 * 2, 64 * 256 * 512 * 2)
    assert counted.written == (2048 * 256 * 2,)
    assert benchmark.count(product, sizes, 1).total == product.least_bytes(sizes)


def test_half_the_experts_read_half_the_weights_at_batch_1():
    experts = benchmark.experts_of("olmoe_1b_7b")
    counted = []
    for k in (8, 4):
        sizes = np.zeros(experts.num_experts, np.int32)
        sizes[3 : 3 + 5 * k : 5] = 1
        product = benchmark.products(experts, 8)["gated"]
        counted.append(benchmark.count(product, sizes, 1).fetched[1])
    assert counted[0] == 2 * counted[1] == 8 * 2 * np.prod(product.matrices)


def test_where_nothing_is_kept_no_kernel_runs():
    """The kernel is one branch of a condition, on the rows kept; the other branch has no operand."""

    def kernels(jaxpr):
        found = Counter(equation.primitive.name for equation in jaxpr.eqns)
        return found["pallas_call"]

    shapes = (8, 256), (2, 4, 128, 256)
    rows, weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    jaxpr = jax.make_jaxpr(pallas_tpu.forward)(rows, weights, jnp.zeros(4, jnp.int32), 1)
    assert kernels(jaxpr) == 0
    (condition,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "cond")
    without_rows, with_rows = condition.params["branches"]
    assert kernels(without_rows) == 0 and kernels(with_rows) == 1
