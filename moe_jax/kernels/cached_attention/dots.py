"""Attention against a cache as two matrix products, which a TPU does where the cache lies."""

import jax
import jax.numpy as jnp

from moe_jax.kernels.cached_attention import xla


def forward(*arguments):
    """As `api.cached_attention`."""
    return xla.attend(_mix, *arguments)


def _mix(query_BGQA, key_BMGA, value_BMGX, seen_BM, scale):
    settings = {"preferred_element_type": jnp.float32, "precision": "highest"}
    score_BGQM = jnp.einsum("bgqa,bmga->bgqm", query_BGQA, key_BMGA, **settings)
    share_BGQM = jax.nn.softmax(jnp.where(seen_BM[:, None, None], score_BGQM * scale, -1e30), axis=-1)
    return jnp.einsum("bgqm,bmgx->bgqx", share_BGQM.astype(value_BMGX.dtype), value_BMGX, **settings)
