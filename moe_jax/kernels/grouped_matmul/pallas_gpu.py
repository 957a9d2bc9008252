"""Grouped matmul for Hopper GPUs (sm_90a), on Mosaic GPU; the kernels are in `pallas_gpu_kernel`.

For bfloat16 and float16, with float32 sums. The weights of an expert with up to 57 rows are read once, so decoding is
bound by memory; with many rows the tensor cores are the limit.
"""

from typing import NamedTuple

import jax

from moe_jax.config.architecture import Architecture
from moe_jax.kernels.grouped_matmul import tuned
from moe_jax.kernels.grouped_matmul.stacks import in_stack

PLATFORM = "gpu"
_CAPABILITY = "9.0"
NUM_CORES = 132  # streaming multiprocessors of an H100 or H200, used if there is no device to ask
_WIDTH = 64  # numbers in a swizzled row of 128 bytes; both axes of a matrix must be multiples


class Tiles(NamedTuple):
    """The tile sizes of a product."""

    rows: int  # of the output: 64 or 128
    columns: int  # of the output: a multiple of 64, at most 256
    depth: int  # of the sums, per block: a multiple of 64
    stages: int  # blocks of both operands in shared memory


FEW = Tiles(64, 128, 128, 4)
SEVERAL = Tiles(64, 256, 64, 4)
MANY = Tiles(128, 256, 64, 4)
_SEVERAL_ROWS = 6  # of an expert: from here on, loading them for each 128 columns is a tenth of all that moves
CANDIDATES = {  # worth timing, by the tiles of the rule
    FEW: (FEW, Tiles(64, 128, 64, 8), SEVERAL, Tiles(64, 256, 128, 2)),
    SEVERAL: (SEVERAL, Tiles(64, 256, 64, 5), Tiles(64, 256, 128, 2), FEW),
    MANY: (MANY, Tiles(128, 128, 64, 6), Tiles(128, 192, 64, 4), Tiles(128, 256, 128, 2)),
}


def by_rule(product: str, num_rows: int, num_experts: int) -> Tiles:
    """The tiles where nothing was measured: up to 64 rows per expert, those that stream weights."""
    if product == "weights_gradient" or num_rows > 64 * num_experts:
        return MANY
    return FEW if num_rows < _SEVERAL_ROWS * num_experts else SEVERAL


def candidates(product: str, num_rows: int, num_experts: int) -> tuple[Tiles, ...]:
    """The tiles that are worth timing. Those of a gated product hold two blocks of 64 columns, or four."""
    choices = CANDIDATES[by_rule(product, num_rows, num_experts)]
    return tuple(tiles for tiles in choices if product != "gated" or tiles.columns % 128 == 0)


def case_of(product: str, rows_SX, weights_LEFD) -> tuned.TileKey:
    """What the tiles of a product are looked up by; product is the name of a function here."""
    num_experts, (outputs, inputs) = weights_LEFD.shape[1], weights_LEFD.shape[-2:]
    rows_class = tuned.rows_class(rows_SX.shape[0], num_experts)
    device = jax.devices()[0].device_kind
    return tuned.TileKey(
        device, "pallas_gpu", product, str(weights_LEFD.dtype), num_experts, outputs, inputs, rows_class
    )


def choose_tiles(product: str, rows_SX, weights_LEFD) -> Tiles:
    """The tiles that were measured for a product of arrays on this device, otherwise those of the rule."""
    measured = tuned.lookup(case_of(product, rows_SX, weights_LEFD))
    return Tiles(*measured) if measured else by_rule(product, rows_SX.shape[0], weights_LEFD.shape[1])


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why the kernels cannot run a model's experts on this device; "" if they can."""
    return lacks_widths((architecture.moe.expert_hidden, architecture.decoder.d_model), dtype)


def lacks_widths(widths: tuple[int, int], dtype: str) -> str:
    """Why the kernels cannot multiply by matrices of these widths on this device; "" if they can."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or newer, not {jax.__version__}"
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != _CAPABILITY:
        return f"needs a Hopper GPU (compute capability {_CAPABILITY}), not {jax.devices()[0].compute_capability}"
    if dtype not in ("bfloat16", "float16"):
        return f"multiplies bfloat16 and float16, not {dtype}"
    if any(size % _WIDTH for size in widths):
        return f"needs matrices in multiples of {_WIDTH} by {_WIDTH}, not {widths[0]} by {widths[1]}"
    return ""


def _settings(rows_SX, weights_LEFD, tiles: Tiles, num_cores: int | None) -> dict:
    """Checks that the kernels can run, and returns their settings.

    Raises:
        ValueError: they cannot.
    """
    if rows_SX.dtype != weights_LEFD.dtype:
        raise ValueError(f"pallas_gpu: rows are {rows_SX.dtype}, weights {weights_LEFD.dtype}: expected one dtype")
    if reason := lacks_widths(weights_LEFD.shape[-2:], str(weights_LEFD.dtype)):
        raise ValueError(f"pallas_gpu {reason}; padded would run")
    if num_cores is None:
        num_cores = jax.devices()[0].core_count if jax.default_backend() == "gpu" else NUM_CORES
    return {"tiles": tiles, "num_cores": num_cores}


def forward(rows_SD, weights_LEFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None):
    """As `api.grouped_matmul`.

    Args:
        rows_SD: bfloat16 or float16.
        weights_LEFD: with the same dtype; F and D are multiples of 64.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: tile sizes; None: those measured on this device (`tuned.json`), or chosen by the number of rows.
        num_cores: programs to launch; None: one per streaming multiprocessor of the device.

    Raises:
        ValueError: jax is too old, or the kernels lack the dtype or the shape.
    """
    tiles = tiles or choose_tiles("forward", rows_SD, weights_LEFD)
    settings = _settings(rows_SD, weights_LEFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel  # takes half a second, and fails with an old jax

    return pallas_gpu_kernel.multiply(rows_SD, weights_LEFD, group_sizes_E, layer, **settings)


def gated(rows_SD, gate_up_LEIFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None):
    """[S, F]: silu of the gate times the up-projection, in one pass; sums and the product of the two are float32.

    Args:
        rows_SD: bfloat16 or float16.
        gate_up_LEIFD: with the same dtype, the gate before the up-projection.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: as `forward`, with 128 or 256 columns; half of them are the gate's.
        num_cores: as `forward`.

    Raises:
        ValueError: jax is too old, or the kernels lack the dtype or the shape.
    """
    tiles = tiles or choose_tiles("gated", rows_SD, gate_up_LEIFD)
    settings = _settings(rows_SD, gate_up_LEIFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel

    return pallas_gpu_kernel.multiply(rows_SD, gate_up_LEIFD, group_sizes_E, layer, gated=True, **settings)


def rows_gradient(out_grad_SF, weights_LEFD, group_sizes_E, layer, *, tiles=None, num_cores=None):
    """[S, D]: the gradient of each group's outputs times its expert's matrix; otherwise as `forward`."""
    tiles = tiles or choose_tiles("rows_gradient", out_grad_SF, weights_LEFD)
    settings = _settings(out_grad_SF, weights_LEFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel

    return pallas_gpu_kernel.multiply(out_grad_SF, weights_LEFD, group_sizes_E, layer, transposed=True, **settings)


def weights_gradient(rows_SD, weights_LEFD, group_sizes_E, out_grad_SF, *, tiles=None, num_cores=None):
    """[E, F, D]: for each expert, the transposed gradient of its outputs times its rows; otherwise as `forward`."""
    tiles = tiles or choose_tiles("weights_gradient", rows_SD, weights_LEFD)
    settings = _settings(rows_SD, weights_LEFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel

    return pallas_gpu_kernel.weights_gradient(rows_SD, group_sizes_E, out_grad_SF, **settings)


def backward(rows_SD, weights_LEFD, group_sizes_E, layer, out_grad_SF, **settings):
    """As `reference.backward`; `settings` and errors are those of `forward`."""
    rows_grad_SD = rows_gradient(out_grad_SF, weights_LEFD, group_sizes_E, layer, **settings)
    grad_EFD = weights_gradient(rows_SD, weights_LEFD, group_sizes_E, out_grad_SF, **settings)
    return rows_grad_SD, in_stack(grad_EFD, weights_LEFD, layer)
