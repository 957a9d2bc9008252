"""The least that a step of a decoder moves and computes, from its shapes, and the time that a machine needs for it.

Counted are bytes that no implementation can avoid: every weight that the step uses, once; the filled part of the cache,
read; the keys and values of its tokens, written. Activations are not: they can stay in caches. Of arithmetic, the
matrix products are counted, two operations for a multiplication and an addition.
"""

import dataclasses
from collections.abc import Sequence

from moe_jax.config.architecture import Architecture, AttentionConfig
from moe_jax.model.parameters import Matrix, Parameter, count


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


def _routed(parameter: Parameter) -> bool:
    return "experts" in parameter.modules


def _embeds(parameter: Parameter) -> bool:
    return "V" in parameter.letters


def _always_read(parameter: Parameter) -> bool:
    """By every step, whatever its tokens: all but the embeddings and the routed experts."""
    return not _routed(parameter) and not _embeds(parameter)


def expert_parameters(architecture: Architecture) -> int:
    """Of one routed expert: gate, up and down."""
    return count(architecture, _routed) // sum(architecture.num_experts_L)


def parameters(architecture: Architecture) -> int:
    """Of the whole model, the selection bias included."""
    return count(architecture)


def active_parameters(architecture: Architecture) -> int:
    """That one token uses: as many routed experts as the model was trained with, and all that is not routed.

    Both embeddings count in full, as most publishers have it.
    """
    unused = sum(architecture.num_experts_L) - sum(architecture.k_L)
    return parameters(architecture) - unused * expert_parameters(architecture)


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
    return itemsize * (count(architecture, _always_read) + head + rows + experts + cache)


def _flops(architecture: Architecture, step: Step) -> float:
    trunk = architecture.decoder
    mixing = trunk.num_layers * sum(
        _mixed_numbers(architecture.attention, new) * (new * cached + new * (new + 1) // 2)
        for cached, new in zip(step.cached_B, step.new_B)
    )
    matrices = count(architecture, lambda one: _always_read(one) and one.kind is Matrix)
    head = len(step.new_B) * trunk.d_model * trunk.vocab_size
    products = step.tokens * matrices + mixing + step.kept_slots * expert_parameters(architecture) + head
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
