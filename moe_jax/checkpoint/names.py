"""Names of a stacked parameter's tensors in a checkpoint: one per layer and expert, output dimension first.

The letters at the end of a parameter's name (`dims.py`) are its axes in memory; those of its rule, the stored axes.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig
from moe_jax.model import parameters


class Placement(NamedTuple):
    """One tensor of a checkpoint, and the slice of the stacked parameter that it fills."""

    tensor: str
    index: tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensors of a checkpoint that hold one stacked parameter.

    Attributes:
        parameter: its path in our tree, such as `moe/experts/down_LEDF`.
        tensor: the name of its tensors, with axes that the name spells out: `model.layers.{L}...{E}...weight`.
        stored: the remaining letters in stored order; letters stored as one dimension are joined: `HA D`. A 1 is a
            dimension of size 1 that the parameter lacks.
        halves: the names of the two halves of axis I.
    """

    parameter: str
    tensor: str
    stored: str
    halves: tuple[str, str] = ("gate_proj", "up_proj")

    @property
    def _declared(self) -> parameters.Parameter:
        return parameters.find([self.parameter])

    @property
    def letters(self) -> str:
        """The letters of the stacked parameter, in memory order."""
        return self._declared.letters

    @property
    def float32(self) -> bool:
        """Whether it stays in float32 whatever the dtype of the checkpoint."""
        return self._declared.kind is parameters.SelectionBias

    def _sizes(self, architecture: Architecture) -> dict[str, int]:
        return parameters.sizes_of(architecture, self._declared.modules) | {"1": 1}

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Shape of the stacked parameter."""
        return self._declared.shape(architecture)

    def stored_shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Shape of each of its tensors in the checkpoint."""
        sizes = self._sizes(architecture)
        return tuple(math.prod(sizes[letter] for letter in together) for together in self.stored.split())

    def _name_letters(self) -> list[str]:
        return [letter for letter in self.letters if f"{{{letter}}}" in self.tensor]

    def num_tensors(self, architecture: Architecture) -> int:
        """The number of tensors that hold this parameter."""
        sizes = self._sizes(architecture)
        return math.prod(sizes[letter] for letter in self._name_letters())

    def placements(self, architecture: Architecture) -> Iterator[Placement]:
        """Yields every tensor of this parameter, with the slice that it fills."""
        named, letters = self._name_letters(), self.letters
        sizes = self._sizes(architecture)
        for position in np.ndindex(*(sizes[letter] for letter in named)):
            at = dict(zip(named, position, strict=True))
            yield Placement(
                self._tensor_name(architecture, at), tuple(at.get(letter, slice(None)) for letter in letters)
            )

    def first_tensor(self, architecture: Architecture) -> str:
        """The name of its first tensor."""
        return self._tensor_name(architecture, dict.fromkeys(self._name_letters(), 0))

    def _tensor_name(self, architecture: Architecture, at: dict[str, int]) -> str:
        if "L" in at:
            stack, _, _ = self.parameter.partition("/")
            at = {**at, "L": layer_order.stacks(architecture)[stack][at["L"]]}
        return self.tensor.format(**{**at, "I": self.halves[at.get("I", 0)]})


def trunk_rules(decoder: DecoderConfig) -> list[Rule]:
    """Embedding, final norm and, unless embeddings are tied, the head."""
    rules = [Rule("embedding_VD", "model.embed_tokens.weight", "V D"), Rule("norm_D", "model.norm.weight", "D")]
    if not decoder.tie_embeddings:
        rules.append(Rule("head_VD", "lm_head.weight", "V D"))
    return rules


def attention_rules(stack: str, attention: AttentionConfig) -> list[Rule]:
    """Attention and the two norms of a layer, under the names that most families share."""
    layer = "model.layers.{L}"
    norms = [
        Rule(f"{stack}/attention_norm_LD", f"{layer}.input_layernorm.weight", "D"),
        Rule(f"{stack}/ffn_norm_LD", f"{layer}.post_attention_layernorm.weight", "D"),
    ]
    rules_of = {"grouped": _grouped_rules, "latent": _latent_rules}[attention.kind]
    return norms + rules_of(f"{stack}/attention", f"{layer}.self_attn", attention)


def _grouped_rules(ours: str, theirs: str, attention: AttentionConfig) -> list[Rule]:
    rules = [
        Rule(f"{ours}/query_LHAD", f"{theirs}.q_proj.weight", "HA D"),
        Rule(f"{ours}/key_LGAD", f"{theirs}.k_proj.weight", "GA D"),
        Rule(f"{ours}/value_LGAD", f"{theirs}.v_proj.weight", "GA D"),
        Rule(f"{ours}/output_LDHA", f"{theirs}.o_proj.weight", "D HA"),
    ]
    if attention.qk_norm:
        query, key = ("HA", "GA") if attention.qk_norm_span == "all" else ("A", "A")
        rules += [
            Rule(f"{ours}/query_norm_L{query}", f"{theirs}.q_norm.weight", query),
            Rule(f"{ours}/key_norm_L{key}", f"{theirs}.k_norm.weight", key),
        ]
    if attention.bias:
        rules += [
            Rule(f"{ours}/query_bias_LHA", f"{theirs}.q_proj.bias", "HA"),
            Rule(f"{ours}/key_bias_LGA", f"{theirs}.k_proj.bias", "GA"),
            Rule(f"{ours}/value_bias_LGA", f"{theirs}.v_proj.bias", "GA"),
        ]
    return rules


def _latent_rules(ours: str, theirs: str, attention: AttentionConfig) -> list[Rule]:
    if attention.query_rank:
        queries = [
            Rule(f"{ours}/query_down_LUD", f"{theirs}.q_a_proj.weight", "U D"),
            Rule(f"{ours}/query_latent_norm_LU", f"{theirs}.q_a_layernorm.weight", "U"),
            Rule(f"{ours}/query_up_LHAU", f"{theirs}.q_b_proj.weight", "HA U"),
        ]
    else:
        queries = [Rule(f"{ours}/query_LHAD", f"{theirs}.q_proj.weight", "HA D")]
    return queries + [
        Rule(f"{ours}/latent_LWD", f"{theirs}.kv_a_proj_with_mqa.weight", "W D"),
        Rule(f"{ours}/latent_norm_LZ", f"{theirs}.kv_a_layernorm.weight", "Z"),
        Rule(f"{ours}/key_value_up_LHOZ", f"{theirs}.kv_b_proj.weight", "HO Z"),
        Rule(f"{ours}/output_LDHX", f"{theirs}.o_proj.weight", "D HX"),
    ]


def gated_rules(
    parameter: str, tensor: str, halves: tuple[str, str] = ("gate_proj", "up_proj"), down: str = "down_proj"
) -> list[Rule]:
    """A gated feed-forward: gate and up projections, and the down projection."""
    per_expert = "E" if "{E}" in tensor else ""
    return [
        Rule(f"{parameter}/gate_up_L{per_expert}IFD", f"{tensor}.{{I}}.weight", "F D", halves=halves),
        Rule(f"{parameter}/down_L{per_expert}DF", f"{tensor}.{down}.weight", "D F"),
    ]


def decoder_rules(architecture: Architecture, experts: list[Rule]) -> tuple[Rule, ...]:
    """All rules of a model, stack by stack.

    Args:
        architecture: the model's architecture.
        experts: the rules of router and experts, written for the stack `moe`.
    """
    rules = trunk_rules(architecture.decoder)
    for stack in layer_order.stacks(architecture):
        rules += attention_rules(stack, architecture.attention)
        if stack == layer_order.DENSE:
            rules += gated_rules(f"{stack}/ffn", "model.layers.{L}.mlp")
        else:
            names = (rule.parameter.removeprefix(f"{layer_order.MOE}/") for rule in experts)
            rules += [
                dataclasses.replace(rule, parameter=f"{stack}/{name}")
                for rule, name in zip(experts, names, strict=True)
            ]
    return tuple(rules)
