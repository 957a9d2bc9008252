"""Measures a model's `Calibration` on text: the ratios of a token's expert weights, and which experts are alike."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import layer_order
from moe_jax.kernels import quantized
from moe_jax.kernels.expert_ffn.api import swiglu
from moe_jax.kernels.quantized import Quantized
from moe_jax.model import decoder
from moe_jax.model.finite import require_finite
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration, sample_of
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.routing.router import route
from moe_jax.routing.selection import top_slots

ROWS = 8  # sequences per batch
SAMPLED = 64  # tokens per batch that run through every expert, to compare experts


def rows_of(documents: Sequence[np.ndarray], length: int, count: int, setting: str) -> np.ndarray:
    """tokens_JT int32: the first `length` tokens of up to `count` documents that have as many, in whole batches.

    `setting` names the documents in messages.

    Raises:
        ValueError: fewer than `ROWS` documents are long enough.
    """
    long_enough = [tokens[:length] for tokens in documents if len(tokens) >= length][:count]
    if len(long_enough) < ROWS:
        raise ValueError(
            f"{setting}: expected at least {ROWS} documents of {length} tokens or more, got {len(long_enough)}"
        )
    return np.asarray(long_enough[: len(long_enough) - len(long_enough) % ROWS], np.int32)


def measure(params: decoder.Params, tokens_JT: np.ndarray, execution: decoder.Execution) -> Calibration:
    """Runs the full model on rows of tokens, and every expert on a sample of them.

    The weight ratios of a token are w_i / w_1 for its slots i = 2 to k, heaviest first. The similarity of two experts
    is the cosine between their outputs for the same tokens, concatenated over tokens, whether routed there or not.

    Args:
        params: from `decoder.split`.
        tokens_JT: a multiple of `ROWS` rows.
        execution: static settings of the full model.

    Returns:
        The median ratio of each MoE layer (1 if its k is 1), and the similarity of its experts; the entries of experts
        that a layer does not have are 0.

    Raises:
        NotFiniteError: a measured number is NaN or infinite.
    """
    architecture = execution.architecture
    live = policies.settings([MODEL_OWN] * ROWS, architecture, execution.k_max)
    inputs = jax.jit(decoder.moe_inputs, static_argnums=3)
    moe_layers = [layer for layer in layer_order.layers(architecture) if layer.is_moe]
    ratios: list[list[np.ndarray]] = [[] for _ in moe_layers]
    most_experts = architecture.moe.num_experts
    gram_LEE = np.zeros((len(moe_layers), most_experts, most_experts))
    for first in range(0, len(tokens_JT), ROWS):
        x_LND, _ = inputs(params, tokens_JT[first : first + ROWS], live, execution)
        sample = np.linspace(0, x_LND.shape[1] - 1, SAMPLED).astype(int)
        for stack, index, _, column in moe_layers:
            moe, experts = layer_order.moe_of(architecture, stack), params[stack]["experts"]
            router = {name: value[index] for name, value in params[stack]["router"].items()}
            with_own_k = dataclasses.replace(moe, k=architecture.k_L[column], k_of_layers=())
            ratios[column].append(np.asarray(_ratios(x_LND[column], router, moe=with_own_k)))
            matrices = (_layer(experts[name], index) for name in ("gate_up_LEIFD", "down_LEDF"))
            gram_EE = _gram(x_LND[column, sample], *matrices)
            gram_LEE[column, : moe.num_experts, : moe.num_experts] += gram_EE  # a layer may have fewer experts
    norm_LE = np.sqrt(np.maximum(np.einsum("lee->le", gram_LEE), np.finfo(np.float32).tiny))
    require_finite(gram_LEE, "the outputs of experts", params)
    medians = [np.median(values) if values.size else 1.0 for values in map(np.concatenate, ratios)]
    require_finite(np.array(medians), "the weights of experts", params)
    return Calibration(
        np.array(medians, np.float32),
        (gram_LEE / norm_LE[:, :, None] / norm_LE[:, None, :]).astype(np.float32),
        sample_of(params["moe"]["router"]["weight_LED"]),
    )


def _layer(stack, index: int) -> jax.Array:
    """All experts of one layer; in float32 if they are in eight bits."""
    if isinstance(stack, Quantized):
        return quantized.dequantize(stack.values[index], stack.scale[index], jnp.float32)
    return stack[index]


@functools.partial(jax.jit, static_argnames="moe")
def _ratios(x_ND, router, *, moe):
    """w_i / w_1 of the slots i = 2 to k of all tokens, in one dimension."""
    routing = route(x_ND, router["weight_LED"], router.get("bias_LE"), moe)
    mix_NK = jnp.sort(top_slots(routing, moe.k)[1], axis=1, descending=True)
    return (mix_NK[:, 1:] / mix_NK[:, :1]).reshape(-1)


@jax.jit
def _gram(x_ND, gate_up_EIFD, down_EDF):
    """Inner products of the outputs of every two experts, summed over tokens."""
    gate_up_NEIF = jnp.einsum("nd,eifd->neif", x_ND, gate_up_EIFD, preferred_element_type=jnp.float32)
    hidden_NEF = swiglu(gate_up_NEIF.reshape(*gate_up_NEIF.shape[:2], -1))
    out_END = jnp.einsum("nef,edf->end", hidden_NEF, down_EDF, preferred_element_type=jnp.float32)
    return jnp.einsum("end,fnd->ef", out_END, out_END)
