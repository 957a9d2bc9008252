"""The least that a step of a decoder moves and computes, from its shapes, and the time that a machine needs for it.

Counted are bytes that no implementation can avoid: every weight that the step uses, once; the filled part of the cache,
read; the keys and values of its tokens, written. Activations are not: they can stay in caches. Of arithmetic, the
matrix products are counted, two operations for a multiplication and an addition.
"""

import dataclasses
from collections.abc import Sequence

from moe_jax.config.schema import Architecture


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
    trunk, attention = architecture.decoder, architecture.attention
    head = trunk.vocab_size * trunk.d_model
    rows = 0 if trunk.tie_embeddings else min(step.tokens, trunk.vocab_size) * trunk.d_model  # tied: read as the head
    experts = step.distinct_experts * expert_parameters(architecture)
    position = 2 * trunk.num_layers * attention.num_kv_heads * attention.head_dim
    cache = position * (sum(step.cached_B) + step.tokens)
    return itemsize * (_always_read(architecture) + head + rows + experts + cache)


def _flops(architecture: Architecture, step: Step) -> float:
    trunk, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    query_width = attention.num_heads * attention.head_dim
    seen = sum(new * cached + new * (new + 1) // 2 for cached, new in zip(step.cached_B, step.new_B))
    mixing = 2 * trunk.num_layers * query_width * seen  # a key and a value for each head and position seen
    products = (
        step.tokens * trunk.num_layers * _projections(architecture)
        + mixing
        + step.tokens * trunk.num_dense_layers * 3 * trunk.d_model * trunk.dense_hidden
        + step.tokens * trunk.num_moe_layers * trunk.d_model * moe.num_experts
        + step.tokens * trunk.num_moe_layers * moe.num_shared_experts * expert_parameters(architecture)
        + step.kept_slots * expert_parameters(architecture)
        + len(step.new_B) * trunk.d_model * trunk.vocab_size
    )
    return 2 * products


def _projections(architecture: Architecture) -> int:
    """Weights of one layer's query, key, value and output projections."""
    attention = architecture.attention
    return 2 * architecture.decoder.d_model * (attention.num_heads + attention.num_kv_heads) * attention.head_dim


def _always_read(architecture: Architecture) -> int:
    """Parameters that every step reads, whatever its tokens: all but the embeddings and the routed experts."""
    trunk, attention, moe = architecture.decoder, architecture.attention, architecture.moe
    layer = _projections(architecture) + 2 * trunk.d_model
    if attention.bias:
        layer += (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
    if attention.qk_norm:
        layer += 2 * attention.head_dim
    router = trunk.d_model * moe.num_experts + (moe.num_experts if moe.selection_bias else 0)
    shared = moe.num_shared_experts * expert_parameters(architecture)
    dense = 3 * trunk.d_model * trunk.dense_hidden
    return (
        trunk.num_layers * layer
        + trunk.num_moe_layers * (router + shared)
        + trunk.num_dense_layers * dense
        + trunk.d_model
    )
