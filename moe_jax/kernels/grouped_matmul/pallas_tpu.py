"""Grouped matmul for TPUs (v5e and newer), on Mosaic; the kernels are in `pallas_tpu_kernel`.

For bfloat16 and float32, with float32 sums; weights may be in eight bits. The weights of each expert that has rows are
read once, whatever the number of rows; the layer is one more index of the blocks, so nothing is sliced out of the stack
but scales.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.architecture import Architecture
from moe_jax.kernels import quantized
from moe_jax.kernels.grouped_matmul import pallas_tpu_tiles
from moe_jax.kernels.grouped_matmul.pallas_tpu_tiles import GradientTiles, Tiles
from moe_jax.kernels.grouped_matmul.stacks import in_stack
from moe_jax.kernels.quantized import Quantized

PLATFORM = "tpu"
EIGHT_BITS = quantized.DTYPES
_TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")


def lacks(architecture: Architecture, dtype: str) -> str:
    """Why the kernels cannot run a model's experts; "" if they can."""
    return _lacks(dtype)


def _lacks(dtype: str) -> str:
    if jax.default_backend() == "tpu" and (kind := jax.devices()[0].device_kind).startswith(_TOO_SMALL):
        return f"needs the vector memory of a TPU v5e or newer, not {kind}"
    return "" if dtype in ("bfloat16", "float32") else f"multiplies bfloat16 and float32, not {dtype}"


def lacks_eight_bits(architecture: Architecture, expert_dtype: str) -> str:
    """Why the kernels cannot run a model's experts in eight bits, quantised as they are here; "" if they can."""
    from moe_jax.kernels.grouped_matmul import pallas_tpu_scales

    hidden, d_model = architecture.moe.expert_hidden, architecture.decoder.d_model
    for matrix in ((hidden, d_model), (d_model, hidden)):
        block = quantized.even_block(quantized.block_of(expert_dtype, *matrix), *matrix)
        if reason := pallas_tpu_scales.lacks(block, *matrix):
            return reason
    return ""


def _check(rows_SX, weights):
    if isinstance(weights, Quantized):
        from moe_jax.kernels.grouped_matmul import pallas_tpu_scales

        reason = _lacks(rows_SX.dtype.name) or pallas_tpu_scales.lacks(weights.block, *weights.shape[-2:])
        if reason:
            raise ValueError(f"pallas_tpu {reason}; blocked would run")
        return
    if reason := _lacks(weights.dtype.name):
        raise ValueError(f"pallas_tpu {reason}; ragged_dot would run")
    if rows_SX.dtype != weights.dtype:
        raise ValueError(f"pallas_tpu: expected rows in the weights' {weights.dtype}, got {rows_SX.dtype}")


def _cores(num_cores: int | None) -> int:
    """The number of cores to share the work; two also suit a device that has one."""
    if num_cores is not None:
        return num_cores
    return jax.devices()[0].num_cores if jax.default_backend() == "tpu" else 2


def launch_product(rows_SX, weights_LEIFD, group_sizes_E, layer, *, transposed=False, tiles=None, num_cores=None):
    """The launch that `forward`, `gated` and `rows_gradient` make, not run: see `pallas_tpu_kernel.product`."""
    from moe_jax.kernels.grouped_matmul import pallas_tpu_kernel  # takes half a second

    _check(rows_SX, weights_LEIFD)
    num_matrices, *matrix = weights_LEIFD.shape[2:]
    columns = matrix[1] if transposed else matrix[0]
    if tiles is None:
        settings = {"itemsize": rows_SX.dtype.itemsize, "num_cores": _cores(num_cores)}
        if isinstance(weights_LEIFD, Quantized):
            settings["weight_itemsize"] = 1
        tiles = pallas_tpu_tiles.for_product(*rows_SX.shape, columns, num_matrices, **settings)
    return pallas_tpu_kernel.product(rows_SX, weights_LEIFD, group_sizes_E, layer, tiles=tiles, transposed=transposed)


def _multiply(rows_SX, weights_LEIFD, group_sizes_E, layer, **settings):
    launch = launch_product(rows_SX, weights_LEIFD, group_sizes_E, layer, **settings)
    # The pipeline fetches the blocks of its first step in any case.
    return lax.cond(group_sizes_E.sum() > 0, launch.run, lambda: jnp.zeros(launch.out.shape, launch.out.dtype))


def _as_one_of_one(weights_LEFD):
    """[L, E, 1, F, D]."""
    return jax.tree.map(lambda part: part[:, :, None], weights_LEFD)


def forward(rows_SD, weights_LEFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None):
    """As `api.grouped_matmul`.

    Args:
        rows_SD: bfloat16 or float32.
        weights_LEFD: of the same dtype, or in eight bits.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: block sizes; None: by shape and dtype.
        num_cores: that share the work, which `tiles` decides; None: those of the device.

    Raises:
        ValueError: the kernels lack the dtype, or no block fits.
    """
    return _multiply(rows_SD, _as_one_of_one(weights_LEFD), group_sizes_E, layer, tiles=tiles, num_cores=num_cores)


def gated(rows_SD, gate_up_LEIFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None):
    """[S, F]: silu of the gate times the up-projection, in one pass; sums and the product of the two are float32.

    Args:
        rows_SD: bfloat16 or float32.
        gate_up_LEIFD: of the same dtype or in eight bits, the gate before the up-projection.
        group_sizes_E: int32.
        layer: int32 scalar.
        tiles: as `forward`.
        num_cores: as `forward`.

    Raises:
        ValueError: as `forward`.
    """
    return _multiply(rows_SD, gate_up_LEIFD, group_sizes_E, layer, tiles=tiles, num_cores=num_cores)


def rows_gradient(
    out_grad_SF, weights_LEFD, group_sizes_E, layer, *, tiles: Tiles | None = None, num_cores: int | None = None
):
    """[S, D]: the gradient of each group's outputs times its expert's matrix; otherwise as `forward`."""
    return _multiply(
        out_grad_SF, weights_LEFD[:, :, None], group_sizes_E, layer, transposed=True, tiles=tiles, num_cores=num_cores
    )


def launch_weights_gradient(rows_SD, group_sizes_E, out_grad_SF, *, tiles: GradientTiles | None = None, num_cores=None):
    """The launch that `weights_gradient` makes, not run."""
    from moe_jax.kernels.grouped_matmul import pallas_tpu_kernel

    _check(rows_SD, out_grad_SF)
    shape = (rows_SD.shape[0], out_grad_SF.shape[1], rows_SD.shape[1])
    tiles = tiles or pallas_tpu_tiles.for_gradient(*shape, rows_SD.dtype.itemsize, _cores(num_cores))
    return pallas_tpu_kernel.weights_gradient(rows_SD, group_sizes_E, out_grad_SF, tiles=tiles)


def weights_gradient(rows_SD, group_sizes_E, out_grad_SF, *, tiles: GradientTiles | None = None, num_cores=None):
    """[E, F, D]: for each expert, the transposed gradient of its outputs times its rows; zero without rows."""
    return launch_weights_gradient(rows_SD, group_sizes_E, out_grad_SF, tiles=tiles, num_cores=num_cores).run()


def backward(rows_SD, weights_LEFD, group_sizes_E, layer, out_grad_SF):
    """As `reference.backward`; errors are those of `forward`."""
    rows_grad_SD = rows_gradient(out_grad_SF, weights_LEFD, group_sizes_E, layer)
    grad_EFD = weights_gradient(rows_SD, group_sizes_E, out_grad_SF)
    return rows_grad_SD, in_stack(grad_EFD, weights_LEFD, layer)
