"""Grouped matmul for Hopper GPUs (sm_90a), on Mosaic GPU: the kernels are in `pallas_gpu_kernel`.

bfloat16 and float16, with float32 sums. Each expert that has rows is read once where no more than 57 rows share it, so
that decoding is bound by that; with many rows the tensor cores are the limit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_NUM_CORES = 132  # streaming multiprocessors of an H100 or H200, where no device is at hand to ask
_WIDTH = 64  # numbers: what a swizzled row of 128 bytes holds, so both axes of a matrix are multiples


class Tiles(NamedTuple):
    """How the products are cut."""

    rows: int  # of the output: 64 or 128
    columns: int  # of the output: a multiple of 64, at most 256
    depth: int  # of the sums, per block: a multiple of 64
    stages: int  # blocks of both operands in shared memory


FEW = Tiles(64, 64, 128, 6)
FEW_GATED = Tiles(64, 128, 128, 4)
MANY = Tiles(128, 256, 64, 4)


def choose_tiles(num_rows: int, num_experts: int) -> Tiles:
    """The tiles for a number of rows: those that stream weights where few rows share a matrix."""
    return MANY if num_rows > 64 * num_experts else FEW


def _settings(rows_SX, weights_LEFD, tiles: Tiles, num_cores: int | None) -> dict:
    """What the kernels take, once it is known that they can run.

    Raises:
        ValueError: jax is too old, or the kernels lack the dtype or the shape.
    """
    dtypes = {str(rows_SX.dtype), str(weights_LEFD.dtype)}
    if jax.__version_info__ < (0, 11):
        raise ValueError(f"pallas_gpu: expected jax 0.11 or newer, got {jax.__version__}; padded runs on any")
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise ValueError(
            f"pallas_gpu: expected rows and weights in bfloat16 or float16, got {dtypes}; padded takes any"
        )
    if any(size % _WIDTH for size in weights_LEFD.shape[-2:]):
        shape = weights_LEFD.shape[-2:]
        raise ValueError(
            f"pallas_gpu: expected matrices in multiples of {_WIDTH} by {_WIDTH}, got {shape}; padded takes any"
        )
    if num_cores is None:
        num_cores = jax.devices()[0].core_count if jax.default_backend() == "gpu" else _NUM_CORES
    return {"tiles": tiles, "num_cores": num_cores}


def forward(rows_SD, weights_LEFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None):
    """As `api.grouped_matmul`.

    Args:
        rows_SD: bfloat16 or float16.
        weights_LEFD: of the same dtype; F and D are multiples of 64.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: how to cut; by the number of rows where it is not given.
        num_cores: programs to launch; one per streaming multiprocessor of the device where it is not given.

    Raises:
        ValueError: jax is too old, or the kernels lack the dtype or the shape.
    """
    tiles = tiles or choose_tiles(rows_SD.shape[0], group_sizes_E.shape[0])
    settings = _settings(rows_SD, weights_LEFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel  # half a second, and not for an old jax

    return pallas_gpu_kernel.multiply(rows_SD, weights_LEFD, group_sizes_E, layer, **settings)


def gated(rows_SD, gate_up_LEIFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None):
    """[S, F]: silu of the gate times the up-projection, in one pass over both; sums and their product are float32.

    Args:
        rows_SD: bfloat16 or float16.
        gate_up_LEIFD: of the same dtype, the gate before the up-projection.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: as `forward`; half of the columns are the gate's, so there are at least 128.
        num_cores: as `forward`.

    Raises:
        ValueError: jax is too old, or the kernels lack the dtype or the shape.
    """
    if tiles is None:
        tiles = choose_tiles(rows_SD.shape[0], group_sizes_E.shape[0])
        tiles = FEW_GATED if tiles == FEW else tiles
    settings = _settings(rows_SD, gate_up_LEIFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel

    return pallas_gpu_kernel.multiply(rows_SD, gate_up_LEIFD, group_sizes_E, layer, gated=True, **settings)


def rows_gradient(out_grad_SF, weights_LEFD, group_sizes_E, layer, *, tiles=None, num_cores=None):
    """[S, D]: each group's gradient of its outputs times the matrix of its expert; as `forward` otherwise."""
    tiles = tiles or choose_tiles(out_grad_SF.shape[0], group_sizes_E.shape[0])
    settings = _settings(out_grad_SF, weights_LEFD, tiles, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel

    return pallas_gpu_kernel.multiply(out_grad_SF, weights_LEFD, group_sizes_E, layer, transposed=True, **settings)


def weights_gradient(rows_SD, weights_LEFD, group_sizes_E, out_grad_SF, *, tiles=None, num_cores=None):
    """[E, F, D]: of each expert, the gradient of its outputs transposed times its rows; as `forward` otherwise."""
    settings = _settings(rows_SD, weights_LEFD, tiles or MANY, num_cores)
    from moe_jax.kernels.grouped_matmul import pallas_gpu_kernel

    return pallas_gpu_kernel.weights_gradient(rows_SD, group_sizes_E, out_grad_SF, **settings)


def backward(rows_SD, weights_LEFD, group_sizes_E, layer, out_grad_SF, **settings):
    """As `reference.backward`; `settings` and errors are those of `forward`."""
    rows_grad_SD = rows_gradient(out_grad_SF, weights_LEFD, group_sizes_E, layer, **settings)
    grad_EFD = weights_gradient(rows_SD, weights_LEFD, group_sizes_E, out_grad_SF, **settings)
    if weights_LEFD.shape[0] == 1:
        return rows_grad_SD, grad_EFD[None]
    return rows_grad_SD, lax.dynamic_update_slice(jnp.zeros_like(weights_LEFD), grad_EFD[None], (layer, 0, 0, 0))
