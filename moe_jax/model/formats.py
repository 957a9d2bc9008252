"""The order in which the dimensions of a parameter lie in the memory of a device, where it is not that of its letters.

A TPU multiplies by tiles of the two dimensions that lie innermost, one of them summed over. Attention's output
projections sum over both of theirs, heads and channels: XLA would lay out those of all layers once more in every call,
which takes as much memory again.
"""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from moe_jax.model import parameters
from moe_jax.model.parameters import Parameter


def of_parameter(parameter: Parameter, sharding: NamedSharding, platform: str) -> NamedSharding | Format:
    """The sharding, with an order if that is not the usual one: L, H, D and the channels of a head, on a TPU."""
    if platform == "tpu" and len(parameter.inputs) == 2:
        return Format(Layout((0, 2, 1, 3)), sharding)
    return sharding


def laid_out(params: Any, platform: str) -> Any:
    """Parameters in their order; the same arrays where it is the usual one."""
    if platform != "tpu":
        return params

    def put(path, leaf):
        order = of_parameter(parameters.find_key(path), leaf.sharding, platform)
        return jax.device_put(leaf, order) if isinstance(order, Format) else leaf

    return jax.tree_util.tree_map_with_path(put, params)
