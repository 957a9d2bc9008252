"""A Qwen3-MoE whose layers may differ, as a plain loop over the tensors of its checkpoint, in float32."""

import jax
import jax.numpy as jnp


def norm(x, scale, eps):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x_THA, theta):
    """Rotates channel i together with channel i + half."""
    length, _, width = x_THA.shape
    angle = jnp.arange(length)[:, None] * theta ** (-jnp.arange(0, width, 2) / width)
    cos, sin = (jnp.concatenate([f(angle), f(angle)], -1)[:, None] for f in (jnp.cos, jnp.sin))
    one, other = jnp.split(x_THA, 2, -1)
    return x_THA * cos + jnp.concatenate([-other, one], -1) * sin


def gated(x, tensors, name):
    gate, up, down = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


def attention(x_TD, tensors, name, architecture):
    config, eps, length = architecture.attention, architecture.decoder.norm_eps, len(x_TD)
    query, key, value = (
        (x_TD @ tensors[f"{name}.{part}_proj.weight"].T).reshape(length, -1, config.head_dim) for part in "qkv"
    )
    query, key = (
        rotate(norm(x, tensors[f"{name}.{part}_norm.weight"], eps), config.rope_theta)
        for x, part in ((query, "q"), (key, "k"))
    )
    key, value = (jnp.repeat(x, config.num_heads // config.num_kv_heads, 1) for x in (key, value))
    scores = jnp.einsum("tha,sha->hts", query, key) * config.head_dim**-0.5
    seen = jnp.arange(length)[:, None] >= jnp.arange(length)
    mixed = jnp.einsum("hts,sha->tha", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1), value)
    return mixed.reshape(length, -1) @ tensors[f"{name}.o_proj.weight"].T


def sparse(x_TD, tensors, name, k, normalize, present=True):
    """Runs every expert on every token, and adds those with the k largest weights, of the experts that are present."""
    weight = jax.nn.softmax(jnp.where(present, x_TD @ tensors[f"{name}.gate.weight"].T, -jnp.inf), -1)
    k_th = jnp.sort(weight, -1)[:, -k][:, None]
    weight = jnp.where(weight >= k_th, weight, 0)
    if normalize:
        weight = weight / weight.sum(-1, keepdims=True)
    experts = range(weight.shape[1])
    gate, up, down = (
        jnp.stack([tensors[f"{name}.experts.{expert}.{part}_proj.weight"] for expert in experts])
        for part in ("gate", "up", "down")
    )
    hidden = jax.nn.silu(jnp.einsum("td,efd->etf", x_TD, gate)) * jnp.einsum("td,efd->etf", x_TD, up)
    return jnp.einsum("te,etf,edf->td", weight, hidden, down)


def logits(tensors, tokens_T, architecture, k_L, present_L=None):
    """The logits of one row; `k_L` has one k per MoE layer, and `present_L` a mask of its experts."""
    decoder, k_of = architecture.decoder, iter(zip(k_L, present_L or [True] * len(k_L), strict=True))
    x_TD = tensors["model.embed_tokens.weight"][tokens_T]
    for layer in range(decoder.num_layers):
        name = f"model.layers.{layer}"
        normed = norm(x_TD, tensors[f"{name}.input_layernorm.weight"], decoder.norm_eps)
        x_TD = x_TD + attention(normed, tensors, f"{name}.self_attn", architecture)
        normed = norm(x_TD, tensors[f"{name}.post_attention_layernorm.weight"], decoder.norm_eps)
        if f"{name}.mlp.gate.weight" in tensors:
            k, present = next(k_of)
            x_TD = x_TD + sparse(normed, tensors, f"{name}.mlp", k, architecture.moe.normalize, present)
        else:
            x_TD = x_TD + gated(normed, tensors, f"{name}.mlp")
    return norm(x_TD, tensors["model.norm.weight"], decoder.norm_eps) @ tensors["lm_head.weight"].T
