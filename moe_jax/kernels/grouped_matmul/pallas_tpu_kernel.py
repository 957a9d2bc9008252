"""The kernels of `pallas_tpu`: a product of sorted rows with their experts' matrices, and the gradient to weights.

Both run on Pallas' own pipeline: a block that the step before used is not fetched again. Visits (`pallas_tpu_visits`)
say which blocks a step needs. A block of rows may hold rows of several experts: each of them multiplies only its own,
a few at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels.grouped_matmul import pallas_tpu_scales
from moe_jax.kernels.grouped_matmul import pallas_tpu_tiles as tiles_of
from moe_jax.kernels.grouped_matmul import pallas_tpu_visits as visits_of
from moe_jax.kernels.quantized import Quantized


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One `pallas_call` and its arguments. `moe_jax.kernels.traffic` counts the bytes that it moves."""

    name: str  # in compiled programs and profiles
    kernel: Callable
    grid_spec: pltpu.PrefetchScalarGridSpec
    scalars: tuple[jax.Array, ...]  # prefetched: the index maps read them
    operands: tuple[Any, ...]
    out: jax.ShapeDtypeStruct
    semantics: tuple[str, ...]
    flops: int

    def run(self) -> jax.Array:
        """Runs the kernel."""
        moved = sum(x.size * x.dtype.itemsize for x in (*self.operands, self.out))
        call = pl.pallas_call(
            self.kernel,
            out_shape=self.out,
            grid_spec=self.grid_spec,
            name=self.name,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=self.semantics, vmem_limit_bytes=tiles_of.VMEM_LIMIT_BYTES
            ),
            cost_estimate=pl.CostEstimate(flops=self.flops, bytes_accessed=moved, transcendentals=0),
        )
        return call(*self.scalars, *self.operands)


def _dot(left, right, contract):
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None  # otherwise products are of bfloat16
    return lax.dot_general(left, right, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _own_rows(begin, end, step: int, body):
    """Runs body(rows, own) on `step` rows at a time, over those that hold rows from `begin` up to `end`.

    `own`, [step, 1], marks the rows between the two.
    """

    def of_step(number, carry):
        start = pl.multiple_of(number * step, step)
        row = start + lax.broadcasted_iota(jnp.int32, (step, 1), 0)
        body(pl.ds(start, step), (row >= begin) & (row < end))
        return carry

    last = lax.select(end > begin, lax.div(end + (step - 1), jnp.int32(step)), jnp.int32(0))
    lax.fori_loop(lax.div(begin, jnp.int32(step)), last, of_step, None)


def _in_chunks(size: int, body):
    """Runs body(part) over parts of an axis, which bounds the length of the program and the sums in flight."""
    chunk = next((part for part in (256, 128) if size % part == 0), size)

    def of_chunk(number, carry):
        body(pl.ds(pl.multiple_of(number * chunk, chunk), chunk))
        return carry

    lax.fori_loop(0, size // chunk, of_chunk, None)


def product(rows_SX, weights_LEIXX, group_sizes_E, layer, *, tiles: tiles_of.Tiles, transposed: bool = False) -> Launch:
    """Rows times the matrices of their experts; of two matrices per expert, silu of the first product times the second.

    Args:
        rows_SX: [S, D], or transposed, [S, F].
        weights_LEIXX: [L, E, 1 or 2, F, D]; not transposed, it may be in eight bits.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: block sizes.
        transposed: contract F, to give [S, D], rather than D.
    """
    num_rows, depth = rows_SX.shape
    num_matrices, *matrix = weights_LEIXX.shape[2:]
    columns = matrix[1] if transposed else matrix[0]
    contract = ((1,), (0,)) if transposed else ((1,), (1,))
    visits = visits_of.for_rows(group_sizes_E, num_rows, tiles.rows)
    scaled = isinstance(weights_LEIXX, Quantized)
    scales, scale_specs, values = (), (), weights_LEIXX
    if scaled:
        values, (one, spec) = weights_LEIXX.values, pallas_tpu_scales.operand(weights_LEIXX, layer, tiles.columns)
        scales, scale_specs = (one,), (spec,)
        multiply_scaled = pallas_tpu_scales.product_of(weights_LEIXX, tiles.columns, _dot)

    def kernel(layer, expert_T, block_T, out_block_T, begin_T, end_T, rows, weights, *scales_and_out):
        *scale, out = scales_and_out
        visit = pl.program_id(1)

        @pl.when((visit == 0) | (out_block_T[visit] != out_block_T[lax.max(visit - 1, 0)]))
        def _first_visit():
            out[...] = jnp.zeros_like(out)

        def multiply(at, own):
            def of_columns(part):
                across = (slice(None), part) if transposed else (part, slice(None))

                def times(matrix):
                    if scaled:
                        return multiply_scaled(rows, weights, *scale, at, part, matrix)
                    return _dot(rows[at], weights[matrix, *across], contract)

                sums = times(0)
                if num_matrices == 2:
                    sums = sums * jax.nn.sigmoid(sums) * times(1)
                out[at, part] = jnp.where(own, sums, out[at, part].astype(jnp.float32)).astype(out.dtype)

            _in_chunks(tiles.columns, of_columns)

        _own_rows(begin_T[visit], end_T[visit], tiles.step, multiply)

    def rows_at(column, visit, layer, expert_T, block_T, *_):  # the visit's rows, whole
        return block_T[visit], 0

    def weights_at(column, visit, layer, expert_T, *_):  # its expert's matrices, the columns of this pass
        across = (0, column) if transposed else (column, 0)
        return layer[0], expert_T[visit], 0, *across

    def out_at(column, visit, layer, expert_T, block_T, out_block_T, *_):
        return out_block_T[visit], column

    block = (depth, tiles.columns) if transposed else (tiles.columns, depth)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=6,
        grid=(pl.cdiv(columns, tiles.columns), visits.count),
        in_specs=[
            pl.BlockSpec((tiles.rows, depth), rows_at),
            pl.BlockSpec((None, None, num_matrices, *block), weights_at),
            *scale_specs,
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.columns), out_at),
    )
    return Launch(
        "grouped_matmul_to_rows" if transposed else "grouped_matmul_gated" if num_matrices == 2 else "grouped_matmul",
        kernel,
        grid_spec,
        (jnp.asarray(layer, jnp.int32)[None], *visits[1:]),
        (rows_SX, values, *scales),
        jax.ShapeDtypeStruct((num_rows, columns), rows_SX.dtype),
        ("parallel", "arbitrary"),
        2 * num_rows * depth * columns * num_matrices,
    )


def weights_gradient(rows_SD, group_sizes_E, out_grad_SF, *, tiles: tiles_of.GradientTiles) -> Launch:
    """[E, F, D]: of each expert, the gradient of its outputs transposed times its rows; zero without rows."""
    num_rows, inputs = rows_SD.shape
    outputs, num_experts = out_grad_SF.shape[1], group_sizes_E.shape[0]
    visits = visits_of.for_experts(group_sizes_E, num_rows, tiles.rows)

    def kernel(expert_T, block_T, begin_T, end_T, rows, out_grad, out, sums):
        visit, last = pl.program_id(2), pl.num_programs(2) - 1
        expert = expert_T[visit]

        @pl.when((visit == 0) | (expert != expert_T[lax.max(visit - 1, 0)]))
        def _first_visit():
            sums[...] = jnp.zeros_like(sums)

        def multiply(at, own):
            right = jnp.where(own, rows[at], 0)

            def of_outputs(part):
                sums[part] += _dot(jnp.where(own, out_grad[at, part], 0), right, ((0,), (0,)))

            _in_chunks(tiles.outputs, of_outputs)

        _own_rows(begin_T[visit], end_T[visit], tiles.step, multiply)

        @pl.when((visit == last) | (expert != expert_T[lax.min(visit + 1, last)]))
        def _last_visit():
            out[...] = sums[...].astype(out.dtype)

    def rows_at(down, across, visit, expert_T, block_T, *_):
        return block_T[visit], across

    def out_grad_at(down, across, visit, expert_T, block_T, *_):
        return block_T[visit], down

    def out_at(down, across, visit, expert_T, *_):  # a part of the expert's matrix
        return expert_T[visit], down, across

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(pl.cdiv(outputs, tiles.outputs), pl.cdiv(inputs, tiles.inputs), visits.count),
        in_specs=[
            pl.BlockSpec((tiles.rows, tiles.inputs), rows_at),
            pl.BlockSpec((tiles.rows, tiles.outputs), out_grad_at),
        ],
        out_specs=pl.BlockSpec((None, tiles.outputs, tiles.inputs), out_at),
        scratch_shapes=[pltpu.VMEM((tiles.outputs, tiles.inputs), jnp.float32)],
    )
    return Launch(
        "grouped_matmul_to_weights",
        kernel,
        grid_spec,
        (visits.expert_T, visits.block_T, visits.begin_T, visits.end_T),
        (rows_SD, out_grad_SF),
        jax.ShapeDtypeStruct((num_experts, outputs, inputs), rows_SD.dtype),
        ("parallel", "arbitrary", "arbitrary"),
        2 * num_rows * outputs * inputs,
    )
