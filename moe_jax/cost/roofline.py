"""The least bytes and operations of a decoder step, from its shapes, and the least time that a machine needs for them.

Bytes are those that no implementation can avoid: every weight that the step uses is read once, the filled part of the
cache is read, the keys and values of new tokens are written. Activations are not counted: they can stay in the
processor's caches. Operations are those of matrix products: a multiplication and an addition are two.

Those of arXiv 2505.03531, *Faster MoE LLM Inference for Extremely Large Models*, are for one feed-forward and do count
activations: `ffn_work`, `saturating_tokens`, and what devices exchange that split a layer by experts or by tensors.
"""

import dataclasses
from collections.abc import Sequence

from moe_jax.config.architecture import Architecture, AttentionConfig
from moe_jax.model.decoder import ATTENTION
from moe_jax.model.parameters import Matrix, Parameter, count, count_expert, find, is_routed


@dataclasses.dataclass(frozen=True)
class Step:
    """The work of one prefill or decode step, without finished rows and dropped slots."""

    cached_B: Sequence[float]  # tokens of each row in the cache before the step
    new_B: Sequence[int]  # new tokens of each row
    kept_slots: float  # summed over tokens and MoE layers
    distinct_experts: float  # experts with at least one slot, summed over MoE layers

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(self.new_B)


@dataclasses.dataclass(frozen=True)
class Work:
    """The least bytes and operations of a step."""

    bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


@dataclasses.dataclass(frozen=True)
class Machine:
    """The peak bandwidth and rate of a machine."""

    bytes_per_s: float
    flops_per_s: float


def floor_s(work: Work, machine: Machine) -> float:
    """The least seconds for a step: the longer of moving and computing, which may overlap."""
    return max(work.bytes / machine.bytes_per_s, work.flops / machine.flops_per_s)


def _always_read(parameter: Parameter) -> bool:
    """Whether every step reads it, whatever its tokens: all but the embeddings and the routed experts."""
    return not is_routed(parameter) and "V" not in parameter.letters


def expected_distinct(num_experts: int, k: int, tokens: int) -> float:
    """Distinct experts, on average, of N tokens that choose k evenly and independently: E (1 - (1 - k / E) ** N)."""
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def ffn_work(tokens: float, d_model: int, hidden: int, itemsize: int) -> Work:
    """The work of a gated feed-forward on N tokens, its input, hidden and output numbers included."""
    elements = 3 * d_model * hidden + 2 * tokens * (d_model + hidden)
    return Work(itemsize * elements, 6 * tokens * d_model * hidden)


def saturating_tokens(machine: Machine, d_model: int, hidden: int, itemsize: int) -> float:
    """Tokens from which a gated feed-forward is bound by arithmetic; infinity if its activations alone take longer.

    A token is in k of E experts, so a layer of experts is bound by arithmetic from E / k times the tokens of one.
    """
    ridge = machine.flops_per_s / machine.bytes_per_s
    left = 6 * d_model * hidden - 2 * itemsize * ridge * (d_model + hidden)
    return 3 * itemsize * ridge * d_model * hidden / left if left > 0 else float("inf")


def expert_parallel_elements(tokens: int, k: int, d_model: int) -> int:
    """Numbers that devices with different experts exchange for one layer, at most: each slot out and in again."""
    return 2 * k * tokens * d_model


def tensor_parallel_elements(tokens: int, devices: int, d_model: int) -> int:
    """Numbers that devices with a part of every matrix exchange for one layer, at least: one sum over devices."""
    return 2 * (devices - 1) * tokens * d_model


def work(
    architecture: Architecture,
    step: Step,
    itemsize: int,
    cache_itemsize: int | None = None,
    expert_itemsize: float | None = None,
) -> Work:
    """Counts the least work of a prefill or decode step that samples one token for each row.

    Args:
        architecture: the model's architecture.
        step: the tokens and slots of the step.
        itemsize: bytes of a weight.
        cache_itemsize: bytes of a number in the cache; None: those of a weight.
        expert_itemsize: bytes of a weight of the routed experts; None: those of any other.
    """
    cache_itemsize = itemsize if cache_itemsize is None else cache_itemsize
    expert_itemsize = itemsize if expert_itemsize is None else expert_itemsize
    return Work(_bytes(architecture, step, itemsize, cache_itemsize, expert_itemsize), _flops(architecture, step))


def _bytes(architecture: Architecture, step: Step, itemsize: int, cache_itemsize: int, expert_itemsize: float) -> float:
    trunk = architecture.decoder
    head = _head_size(architecture)
    rows = 0 if trunk.tie_embeddings else min(step.tokens, trunk.vocab_size) * trunk.d_model  # tied: part of the head
    experts = step.distinct_experts * count_expert(architecture)
    position = trunk.num_layers * cached_numbers(architecture.attention)
    cache = position * (sum(step.cached_B) + step.tokens)
    weights = itemsize * (count(architecture, _always_read) + head + rows) + expert_itemsize * experts
    return weights + cache_itemsize * cache


def _flops(architecture: Architecture, step: Step) -> float:
    trunk = architecture.decoder
    mixing = trunk.num_layers * sum(
        mixed_numbers(architecture.attention, new) * (new * cached + new * (new + 1) // 2)
        for cached, new in zip(step.cached_B, step.new_B)
    )
    matrices = count(architecture, lambda parameter: _always_read(parameter) and parameter.kind is Matrix)
    head = len(step.new_B) * _head_size(architecture)
    products = step.tokens * matrices + mixing + step.kept_slots * count_expert(architecture) + head
    return 2 * products


def _head_size(architecture: Architecture) -> int:
    """Numbers of the output embedding, which is as large as the input embedding, or is the same."""
    return find(["embedding_VD"]).size(architecture)


def cached_numbers(attention: AttentionConfig) -> int:
    """Numbers that a layer caches for one token: keys and values, or a latent and a rotary key."""
    kv_heads, *widths = ATTENTION[attention.kind].cached_widths(attention)
    return kv_heads * sum(widths)


def mixed_numbers(attention: AttentionConfig, new: int) -> int:
    """Multiplications of one query token with one token that it sees: all heads, keys and values.

    Latents are expanded to keys and values for a row of several new tokens; for one token they are read directly.
    """
    if attention.kind == "grouped":
        return 2 * attention.num_heads * attention.head_dim
    if new == 1:
        return attention.num_heads * (2 * attention.latent_rank + attention.rope_head_dim)
    return attention.num_heads * (attention.nope_head_dim + attention.rope_head_dim + attention.value_head_dim)
