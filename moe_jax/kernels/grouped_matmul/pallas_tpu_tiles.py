"""The block sizes of `pallas_tpu`, by shape and dtype: one rule for all TPUs, since none has been timed.

The rule looks at memory traffic. Every pass over the output's columns reads each chosen matrix once in total and all
rows again, unless those stay in vector memory. So few rows are kept there, while blocks of weights are small, which
overlaps reading with work from the start; with many rows, blocks of weights are as wide as possible. The two cores of a
v5p share the passes.
"""

from typing import NamedTuple

MiB = 2**20
VMEM_LIMIT_BYTES = 63 * MiB  # of 64 per core of a v5p or TPU7x; v5e and v6e have 128
_BLOCKS_BYTES = 61 * MiB  # of it for blocks of operands and of the output, two of each, and for kept sums
_KEPT_ROWS_BYTES = 8 * MiB  # the most that stays for all passes
_FEW_ROWS_WEIGHTS_BYTES = 4 * MiB  # of one block of weights where rows are kept
_LANES = 128
_STEP = 128  # rows that are multiplied at a time


class Tiles(NamedTuple):
    """The block sizes of a product."""

    rows: int  # a multiple of `step`
    step: int  # rows multiplied at a time
    columns: int  # of the output: a multiple of 128, or all


class GradientTiles(NamedTuple):
    """The block sizes of a gradient to weights."""

    rows: int  # a multiple of `step`
    step: int  # rows multiplied at a time
    outputs: int  # of F: a multiple of 128, or all
    inputs: int  # of D: a multiple of 128, or all


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _part(size: int, parts: int) -> int:
    """The size of one of at most `parts` blocks along an axis; large ones are multiples of a 256-wide matrix unit."""
    part = -(-size // parts)
    return min(size, _round_up(part, 2 * _LANES if part > 4 * _LANES else _LANES))


def _step(num_rows: int, itemsize: int) -> int:
    return min(_STEP, _round_up(num_rows, 32 // itemsize))


def _passes(columns: int, num_cores: int):
    return range(num_cores, _round_up(-(-columns // _LANES), num_cores) + 1, num_cores)


def for_product(
    num_rows: int,
    depth: int,
    columns: int,
    matrices: int,
    itemsize: int,
    num_cores: int,
    weight_itemsize: int | None = None,
) -> Tiles:
    """The block sizes for rows of `depth` numbers times matrices that give `columns` numbers.

    Args:
        num_rows: S.
        depth: D, or F for the gradient to rows.
        columns: F, or D for the gradient to rows.
        matrices: per expert: 2 for gate and up, otherwise 1.
        itemsize: bytes of a number.
        num_cores: of the device; a multiple of it is the number of passes.
        weight_itemsize: bytes of a stored weight; None: those of a number.

    Raises:
        ValueError: no block of 128 columns fits vector memory.
    """
    step = _step(num_rows, itemsize)
    weight_itemsize = weight_itemsize or itemsize

    def weights_bytes(width):
        return weight_itemsize * matrices * width * depth

    def fits(rows, width):
        return 2 * (itemsize * (rows * depth + rows * width) + weights_bytes(width)) <= _BLOCKS_BYTES

    kept = _round_up(num_rows, step)
    if kept * depth * itemsize <= _KEPT_ROWS_BYTES:
        for passes in _passes(columns, num_cores):
            width = _part(columns, passes)
            if weights_bytes(width) <= _FEW_ROWS_WEIGHTS_BYTES and fits(kept, width):
                return Tiles(kept, step, width)
    for passes in _passes(columns, num_cores):
        width = _part(columns, passes)
        for rows in (512, 256, step):
            if rows <= kept and fits(rows, width):
                return Tiles(rows, step, width)
    raise ValueError(
        f"pallas_tpu: matrices of depth {depth} are too deep for vector memory of {VMEM_LIMIT_BYTES // MiB} MiB; "
        "ragged_dot takes any"
    )


def for_gradient(num_rows: int, outputs: int, inputs: int, itemsize: int, num_cores: int) -> GradientTiles:
    """The block sizes for a gradient to matrices [F, D]: the fewest reads of the rows that vector memory allows."""
    step = _step(num_rows, itemsize)
    kept = _round_up(num_rows, step)

    def size(at):
        return 2 * itemsize * (at.rows * (at.outputs + at.inputs) + at.outputs * at.inputs) + 4 * at.outputs * at.inputs

    def read(at):
        return outputs * -(-inputs // at.inputs) + inputs * -(-outputs // at.outputs)

    choices = [
        GradientTiles(rows, step, _part(outputs, down), _part(inputs, across))
        for rows in (512, 256, step)
        if rows <= kept
        for down in _passes(outputs, num_cores)
        for across in _passes(inputs, 1)
    ]
    return min((at for at in choices if size(at) <= _BLOCKS_BYTES), key=read)
