"""Counts the bytes that the TPU and GPU kernels of grouped matmul move, and megablox's, over the least possible.

    python benchmarks/traffic.py --config configs/benchmark_traffic.gin --out out/traffic

Nothing is multiplied: the kernels' own grids and maps are walked (`moe_jax/kernels/traffic.py`). On a GPU each copy
into shared memory counts, also of rows that the cache holds since another piece of the output needed them.

Tokens choose their experts uniformly at random. Of DeepSeek-V3 a chip has 32 of 256 experts, and as many rows as its
own tokens have.
"""

import importlib
import math
import os
import pathlib
import unittest.mock
from typing import Any, NamedTuple

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
# configuration, chips that share the experts
MODELS = {"olmoe_1b_7b": 1, "deepseek_v2_lite": 1, "qwen3_30b_a3b": 1, "deepseek_v3": 8}
TILINGS = ((128, 128, 128), (512, 1024, 1024))  # of megablox: its default, and a common choice for many rows


class Chip(NamedTuple):
    """What Google documents of a TPU (docs.cloud.google.com/tpu/docs), and the cores of one device of JAX."""

    bf16_flops_per_s: float
    bytes_per_s: float
    num_cores: int


CHIPS = {
    "v5e": Chip(197e12, 819e9, 1),
    "v5p": Chip(459e12, 2765e9, 2),
    "v6e": Chip(918e12, 1638e9, 1),
    "tpu7x": Chip(2307e12, 7380e9, 1),
}


class LayerShape(NamedTuple):
    """The shape of the experts of one layer on one chip."""

    num_experts: int
    k: int
    hidden: int  # F
    d_model: int


class Product(NamedTuple):
    """One grouped product, or a gradient of it: two arrays of rows, and matrices that are read or written."""

    rows: tuple[int, int]
    other_rows: tuple[int, int]  # of the output; for the gradient to weights, of the other operand
    matrices: tuple[int, int, int]  # of one expert
    transposed: bool = False
    to_weights: bool = False

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return 2 * self.rows[0] * math.prod(self.matrices)

    def least_bytes(self, sizes) -> int:
        """In bfloat16: matrices of experts that have rows, or of all experts if they are written, and rows."""
        experts = len(sizes) if self.to_weights else int((sizes > 0).sum())
        return 2 * (experts * math.prod(self.matrices) + math.prod(self.rows) + math.prod(self.other_rows))


def experts_of(model: str) -> LayerShape:
    """The experts of a model in `configs/models`, or of a chip's share."""
    from moe_jax.config import gin

    config = gin.read_config(ROOT / "configs" / "models" / f"{model}.gin")
    moe = config.moe
    return LayerShape(moe.num_experts // MODELS[model], moe.k, moe.expert_hidden, config.decoder.d_model)


def draw_sizes(experts: LayerShape, tokens: int, seed: int = 0):
    """Rows per expert if each token chooses k different experts."""
    import numpy as np

    scores = np.random.default_rng(seed).random((tokens, experts.num_experts))
    chosen = np.argpartition(scores, experts.k - 1, axis=1)[:, : experts.k]
    return np.bincount(chosen.ravel(), minlength=experts.num_experts).astype(np.int32)


def products(experts: LayerShape, num_rows: int) -> dict[str, Product]:
    """The products of a layer and their gradients."""
    wide, hidden = (num_rows, experts.d_model), (num_rows, experts.hidden)
    both = (num_rows, 2 * experts.hidden)
    gate_up, down = (1, 2 * experts.hidden, experts.d_model), (1, experts.d_model, experts.hidden)
    return {
        "gate_up": Product(wide, both, gate_up),
        "gated": Product(wide, hidden, (2, experts.hidden, experts.d_model)),
        "down": Product(hidden, wide, down),
        "gate_up_to_rows": Product(both, wide, gate_up, transposed=True),
        "down_to_rows": Product(wide, hidden, down, transposed=True),
        "gate_up_to_weights": Product(wide, both, gate_up, to_weights=True),
        "down_to_weights": Product(hidden, wide, down, to_weights=True),
    }


def _unallocated(shape, dtype="bfloat16"):
    """An array of zeros that takes no memory."""
    import jax.numpy as jnp
    import numpy as np

    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape)


def in_eight_bits(shape, expert_dtype: str, array_of=_unallocated):
    """Weights in eight bits, in blocks as they are quantised; `array_of(shape, dtype)` makes their parts."""
    from moe_jax.kernels.quantized import Quantized, block_of, even_block

    block = even_block(block_of(expert_dtype, *shape[-2:]), *shape[-2:])
    blocks = (size // one for size, one in zip(shape[-2:], block))
    return Quantized(array_of(shape, expert_dtype), array_of((*shape[:-2], *blocks), "float32"))


def count(product: Product, sizes, num_cores: int, expert_dtype: str = ""):
    """The `Traffic` of `pallas_tpu`; a launch that no expert has rows for is not made.

    `expert_dtype` is that of weights in eight bits; "": they are bfloat16.
    """
    import jax.numpy as jnp

    from moe_jax.kernels import traffic
    from moe_jax.kernels.grouped_matmul import pallas_tpu

    rows, other_rows, sizes_E = _unallocated(product.rows), _unallocated(product.other_rows), jnp.asarray(sizes)
    if product.to_weights:
        launch = pallas_tpu.launch_weights_gradient(rows, sizes_E, other_rows, num_cores=num_cores)
    else:
        shape = (1, len(sizes), *product.matrices)
        weights = in_eight_bits(shape, expert_dtype) if expert_dtype else _unallocated(shape)
        settings = {"transposed": product.transposed, "num_cores": num_cores}
        launch = pallas_tpu.launch_product(rows, weights, sizes_E, 0, **settings)
    return traffic.count(launch.grid_spec, launch.scalars, launch.operands, [launch.out], num_cores)


def pieces_gpu(product: Product, sizes, tiles=None):
    """The pieces of a launch of `pallas_gpu` on an H100, and its tables."""
    import jax
    import jax.numpy as jnp

    from moe_jax.kernels.grouped_matmul import pallas_gpu
    from moe_jax.kernels.grouped_matmul.pallas_gpu_pieces import GradientPieces, ProductPieces

    def shape(*size):
        return jax.ShapeDtypeStruct(size, jnp.bfloat16)

    rows, sizes_E = shape(*product.rows), jnp.asarray(sizes)
    if product.to_weights:
        gradient = GradientPieces.of(rows, shape(*product.other_rows), len(sizes), tiles or pallas_gpu.MANY)
        return gradient, gradient.tables(sizes_E)
    gated = product.matrices[0] == 2
    weights = shape(1, len(sizes), *(product.matrices if gated else product.matrices[1:]))
    tiles = tiles or pallas_gpu.by_rule("gated" if gated else "forward", product.rows[0], len(sizes))
    pieces = ProductPieces.of(rows, weights, tiles, pallas_gpu.NUM_CORES, product.transposed, gated)
    return pieces, pieces.tables(sizes_E, 0)


def count_gpu(product: Product, sizes, tiles=None):
    """The `Traffic` of `pallas_gpu`; of a gradient to weights, without the copies of blocks that XLA makes before."""
    import jax
    import jax.numpy as jnp

    from moe_jax.kernels import traffic
    from moe_jax.kernels.grouped_matmul.pallas_gpu_rows import ALIGNMENT

    def shape(*size):
        return jax.ShapeDtypeStruct(size, jnp.bfloat16)

    pieces, tables = pieces_gpu(product, sizes, tiles)
    aligned = -(-product.rows[0] // ALIGNMENT) * ALIGNMENT
    rows, other_rows = shape(aligned, product.rows[1]), shape(aligned, product.other_rows[1])
    if product.to_weights:
        edges = [shape(2 * len(sizes) * pieces.tiles.depth, x.shape[1]) for x in (other_rows, rows)]
        out = shape(len(sizes), *product.matrices[1:])
        return traffic.count_pieces(pieces, tables, (other_rows, rows, *edges), out)
    weights = shape(len(sizes) * product.matrices[0], *product.matrices[1:])
    return traffic.count_pieces(pieces, tables, (rows, weights), other_rows)


def count_megablox(product: Product, sizes, tiling: tuple[int, int, int], num_cores: int):
    """The `Traffic` of JAX's megablox, on rows padded to its blocks."""
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    from moe_jax.kernels import traffic

    padded = -(-product.rows[0] // tiling[0]) * tiling[0]
    rows = _unallocated((padded, product.rows[1]))
    _, outputs, inputs = product.matrices
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    launches: list[Any] = []

    def pallas_call(kernel, out_shape, grid_spec, **settings):
        return lambda *arguments: launches.append((grid_spec, arguments, out_shape))

    depth, columns = (outputs, inputs) if product.transposed or product.to_weights else (inputs, outputs)
    tiling = (tiling[0], min(tiling[1], depth), min(tiling[2], columns))
    settings = {"preferred_element_type": jnp.bfloat16, "tiling": tiling}
    with unittest.mock.patch.object(pl, "pallas_call", pallas_call):
        if product.to_weights:
            out_grad = _unallocated((padded, product.other_rows[1]))
            megablox.tgmm.__wrapped__(out_grad.T, rows, jnp.asarray(sizes), **settings)
        else:
            weights = _unallocated((len(sizes), outputs, inputs))
            megablox.gmm.__wrapped__(
                rows, weights, jnp.asarray(sizes), transpose_rhs=not product.transposed, **settings
            )
    ((grid_spec, arguments, out),) = launches
    scalars, operands = arguments[: grid_spec.num_scalar_prefetch], arguments[grid_spec.num_scalar_prefetch :]
    return traffic.count(grid_spec, scalars, [one for one in operands if one is not None], [out], num_cores)


def main(run: command.Command) -> None:
    """Counts all products of all models at all numbers of tokens, and prints a table."""
    figures, lines = {}, [f"{'':44}{'one core':>9}{'two':>8}{'Hopper':>9}{'megablox':>10}   bound by memory on"]
    tokens = run.config.benchmark.decode_batches + run.config.benchmark.prefill_lengths
    with run.timed("run"):
        for name, number in ((name, number) for name in MODELS for number in tokens):
            experts = experts_of(name)
            sizes = draw_sizes(experts, number, run.config.run.seed)
            for kind, product in products(experts, int(sizes.sum())).items():
                least = product.least_bytes(sizes)
                moved = {cores: count(product, sizes, cores).total for cores in (1, 2)}
                ratios = {f"over_least_{cores}_cores": moved[cores] / least for cores in moved}
                ratios["hopper_over_least"] = count_gpu(product, sizes).total / least
                if kind != "gated":
                    megablox = min(count_megablox(product, sizes, tiling, 1).total for tiling in TILINGS)
                    ratios["megablox_over_least"] = megablox / least
                bound = [
                    chip_name
                    for chip_name, chip in CHIPS.items()
                    if moved[chip.num_cores] / chip.bytes_per_s > product.flops / chip.bf16_flops_per_s
                ]
                case = f"{name}_{number}_{kind}"
                figures |= {f"{case}_{ratio}": {"value": value, "unit": "1"} for ratio, value in ratios.items()}
                columns = "".join(f"{value:9.3f}" for value in ratios.values()) + " " * 9 * (kind == "gated")
                lines.append(f"{name:18}{number:>6} {kind:19}{columns}   {' '.join(bound)}")
    run.finish(figures, text="\n".join(lines))


if __name__ == "__main__":
    command.run(main, default_config=os.path.relpath(ROOT / "configs" / "benchmark_traffic.gin"))
