"""The least that a step of a decoder moves and computes, from its shapes, and the time that a machine needs for it.

Counted are bytes that no implementation can avoid: every weight that the step uses, once; the filled part of the cache,
read; the keys and values of its tokens, written. Activations are not: they can stay in caches. Of arithmetic, the
matrix products are counted, two operations for a multiplication and an addition.
"""

import dataclasses
from collections.abc import Sequence

from moe_jax.config.architecture import Architecture, AttentionConfig


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call of a program works on; rows that are finished and slots that are dropped are left out."""

    cached_B: Sequence[int]  # positions of each row in the cache before the step
    new_B: Sequence[int]  # tokens of each row
    kept_slots: float  # of all tokens, summed over MoE layers
    distinct_experts: float  # that held a slot, summed over MoE layers

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(self.new_B)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step takes at the least."""

    bytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine can do at the most."""

    bytes_per_s: float
    flops_per_s: float


def floor_s(work: Work, machine: Machine) -> float:
    """The seconds that moving or computing takes, whichever is longer: the two may overlap."""
    return max(work.bytes / machine.bytes_per_s, work.flops / machine.flops_per_s)


def expert_parameters(architecture: Architecture) -> int:
    """Of one routed expert: gate, up and down."""
    return 3 * architecture.decoder.d_model * architecture.moe.expert_hidden


def parameters(architecture: Architecture) -> int:
    """Of the whole model, the selection bias included."""
    trunk, moe = architecture.decoder, architecture.moe
    embeddings = trunk.vocab_size * trunk.d_model * (1 if trunk.tie_embeddings else 2)
    routed = trunk.num_moe_layers * moe.num_experts * expert_parameters(architecture)
    return embeddings + routed + _always_read(architecture)


def active_parameters(architecture: Architecture) -> int:
    """That one token uses: as many routed experts as the model was trained with, and all that is not routed.

    Both embeddings count in full, as most publishers have it.
    """
    unused = architecture.moe.num_experts - architecture.moe.k
    return parameters(architecture) - architecture.decoder.num_moe_layers * unused * expert_parameters(architecture)


def expected_distinct(num_experts: int, k: int, tokens: int) -> float:
    """Distinct experts of so many tokens that choose k each, evenly and independently: E (1 - (1 - k / E) ** N)."""
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def work(architecture: Architecture, step: Step, itemsize: int) -> Work:
    """Counts a prefill or a decode step, which draws one token for each row.

    Args:
        architecture: of the model.
        step: what it works on.
        itemsize: bytes of a weight and of a cached number.
    """
    return Work(_bytes(architecture, step, itemsize), _flops(architecture, step))


def _bytes(architecture: Architecture, step: Step, itemsize: int) -> float:
    trunk = architecture.decoder
    head = trunk.vocab_size * trunk.d_model
    rows = 0 if trunk.tie_embeddings else min(step.tokens, trunk.vocab_size) * trunk.d_model  # tied: read as the head
    experts = step.distinct_experts * expert_parameters(architecture)
    position = trunk.num_layers * _cached_numbers(architecture.attention)
    cache = position * (sum(step.cached_B) + step.tokens)
    return itemsize * (_always_read(architecture) + head + rows + experts + cache)


def _flops(architecture: Architecture, step: Step) -> float:
    trunk, moe = architecture.decoder, architecture.moe
    mixing = trunk.num_layers * sum(
        _mixed_numbers(architecture.attention, new) * (new * cached + new * (new + 1) // 2)
        for cached, new in zip(step.cached_B, step.new_B)
    )
    products = (
        step.tokens * trunk.num_layers * _projections(architecture)
        + mixing
        + step.tokens * trunk.num_dense_layers * 3 * trunk.d_model * trunk.dense_hidden
        + step.tokens * trunk.num_moe_layers * trunk.d_model * moe.num_experts
        + step.tokens * trunk.num_moe_layers * _shared_parameters(architecture)
        + step.kept_slots * expert_parameters(architecture)
        + len(step.new_B) * trunk.d_model * trunk.vocab_size
    )
    return 2 * products


def _cached_numbers(attention: AttentionConfig) -> int:
    """That a layer keeps of one position: keys and values, or a latent and a rotary key."""
    if attention.kind == "latent":
        return attention.latent_rank + attention.rope_head_dim
    return 2 * attention.num_kv_heads * attention.head_dim


def _mixed_numbers(attention: AttentionConfig, new: int) -> int:
    """Products of one query with one position that it sees: of all heads, with keys and with values.

    Latents are expanded to keys and values for a row of several tokens; for one token they are read as they are.
    """
    if attention.kind == "grouped":
        return 2 * attention.num_heads * attention.head_dim
    if new == 1:
        return attention.num_heads * (2 * attention.latent_rank + attention.rope_head_dim)
    return attention.num_heads * (attention.nope_head_dim + attention.rope_head_dim + attention.value_head_dim)


def _projections(architecture: Architecture) -> int:
    """Weights of the projections of one layer's attention."""
    attention, d_model = architecture.attention, architecture.decoder.d_model
    if attention.kind == "grouped":
        return 2 * d_model * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    key_width = attention.num_heads * (attention.nope_head_dim + attention.rope_head_dim)
    value_width = attention.num_heads * attention.value_head_dim
    query = attention.query_rank * (d_model + key_width) if attention.query_rank else d_model * key_width
    latent = d_model * (attention.latent_rank + attention.rope_head_dim)
    expanded = attention.latent_rank * (attention.num_heads * attention.nope_head_dim + value_width)
    return query + latent + expanded + value_width * d_model


def _attention_norms_and_biases(attention: AttentionConfig) -> int:
    """Of one layer."""
    if attention.kind == "latent":
        return attention.query_rank + attention.latent_rank
    width, kv_width = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    norms = {"head": 2 * attention.head_dim, "all": width + kv_width}[attention.qk_norm_span] * attention.qk_norm
    return norms + (width + 2 * kv_width) * attention.bias


def _shared_parameters(architecture: Architecture) -> int:
    """Of the shared experts of one layer, and of their gate."""
    moe, d_model = architecture.moe, architecture.decoder.d_model
    return 3 * d_model * moe.shared_width + d_model * moe.shared_gate


def _always_read(architecture: Architecture) -> int:
    """Parameters that every step reads, whatever its tokens: all but the embeddings and the routed experts."""
    trunk, moe = architecture.decoder, architecture.moe
    layer = _projections(architecture) + _attention_norms_and_biases(architecture.attention) + 2 * trunk.d_model
    router = trunk.d_model * moe.num_experts + moe.num_experts * moe.selection_bias
    dense = 3 * trunk.d_model * trunk.dense_hidden
    return (
        trunk.num_layers * layer
        + trunk.num_moe_layers * (router + _shared_parameters(architecture))
        + trunk.num_dense_layers * dense
        + trunk.d_model
    )
