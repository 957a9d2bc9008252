"""The router: from token activations to scores that choose experts, and weights that mix their outputs."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing.selection import Routing


def route(x_ND: jax.Array, weight_ED: jax.Array, bias_E: jax.Array | None, moe: MoEConfig) -> Routing:
    """Scores every expert for every token, in float32 whatever the model's dtype.

    The selection bias changes the choice but not the mixing weights (auxiliary-loss-free balancing, DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2). With groups, a group's score is the sum of its two best experts' scores
    (DeepSeek-V3) or that of its best expert (DeepSeek-V2); experts outside the best `num_groups_kept` groups get -inf.
    """
    x_ND, weight_ED = x_ND.astype(jnp.float32), weight_ED.astype(jnp.float32)
    logits_NE = jnp.einsum("nd,ed->ne", x_ND, weight_ED, precision=lax.Precision.HIGHEST)
    mix_NE = jax.nn.softmax(logits_NE, axis=1) if moe.score == "softmax" else jax.nn.sigmoid(logits_NE)
    score_NE = mix_NE if bias_E is None else mix_NE + bias_E[None, :]
    if moe.num_groups > 1:
        score_NE = _limit_groups(score_NE, moe)
    return Routing(lax.stop_gradient(score_NE), mix_NE)


def _limit_groups(score_NE: jax.Array, moe: MoEConfig) -> jax.Array:
    num_tokens, num_experts = score_NE.shape
    score_NRE = score_NE.reshape(num_tokens, moe.num_groups, num_experts // moe.num_groups)
    counted = 2 if moe.group_score == "best_two" else 1
    group_score_NR = lax.top_k(score_NRE, min(counted, score_NRE.shape[2]))[0].sum(axis=2)
    _, kept = lax.top_k(group_score_NR, moe.num_groups_kept)
    kept_NR = (kept[:, :, None] == jnp.arange(moe.num_groups)[None, None, :]).any(axis=1)
    return jnp.where(kept_NR[:, :, None], score_NRE, -jnp.inf).reshape(num_tokens, num_experts)
