"""Causal attention on a mesh: rows over `data`, heads over `tensor`, every device with whole sequences of its own."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.kernels.causal_attention.api import causal_attention
from moe_jax.model.attention import Mix
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import Layout


def spread_over(execution: Execution) -> Mix:
    """`spread` with the implementation and the mesh of an execution."""
    return functools.partial(spread, implementation=execution.kernels.causal_attention, layout=execution.layout)


def spread(
    query_BTHA: jax.Array,
    key_BMGA: jax.Array,
    value_BMGX: jax.Array,
    segments_BM: jax.Array | None,
    start_B: jax.Array,
    scale: float,
    implementation: str,
    layout: Layout | None,
    *,
    prefixes: bool,
) -> jax.Array:
    """`causal_attention` inside `shard_map`, since a kernel reads local arrays; as it is without a layout.

    Key and value heads that the devices of `tensor` cannot divide are whole on each of them, which then takes those of
    its own query heads.
    """
    settings = {"scale": scale, "implementation": implementation, "prefixes": prefixes}
    if layout is None:
        return causal_attention(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, **settings)
    num_heads, kv_heads, parts = query_BTHA.shape[2], key_BMGA.shape[2], layout.mesh.shape["tensor"]
    divided = kv_heads % parts == 0
    heads, keys = P("data", None, "tensor"), P("data", None, "tensor" if divided else None)
    segments = None if segments_BM is None else P("data")

    def run(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B):
        if not divided:
            first = lax.axis_index("tensor") * query_BTHA.shape[2]
            count = 1 if parts % kv_heads == 0 else query_BTHA.shape[2]
            own = (first + jnp.arange(count)) * kv_heads // num_heads
            key_BMGA, value_BMGX = (jnp.take(x, own, axis=2) for x in (key_BMGA, value_BMGX))
        return causal_attention(query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B, **settings)

    shard = functools.partial(jax.shard_map, mesh=layout.mesh, out_specs=heads, check_vma=False)
    return shard(run, in_specs=(heads, keys, keys, segments, P("data")))(
        query_BTHA, key_BMGA, value_BMGX, segments_BM, start_B
    )
