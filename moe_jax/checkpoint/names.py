"""How stacked parameters are spelled in a checkpoint: one tensor per layer and expert, output dimension first.

The letters at the end of a parameter's name (`dims.py`) say how it lies in memory; those of its rule, how it is stored.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.config.schema import Architecture, AttentionConfig, DecoderConfig


class Placement(NamedTuple):
    """One tensor of a checkpoint and the slice of the stacked parameter that it fills."""

    tensor: str
    index: tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one stacked parameter is kept in a checkpoint.

    Attributes:
        parameter: its path in our tree, such as `moe/experts/down_LEDF`.
        tensor: the name of its tensors, with the letters that the name spells out: `model.layers.{L}...{E}...weight`.
        stored: the remaining letters in stored order; those stored as one dimension stand together: `HA D`.
        float32: kept in float32 whatever the dtype of the checkpoint.
    """

    parameter: str
    tensor: str
    stored: str
    float32: bool = False

    @property
    def letters(self) -> str:
        """The letters of the stacked parameter, in memory order."""
        return self.parameter.rsplit("_", 1)[1]

    def _sizes(self, architecture: Architecture) -> dict[str, int]:
        decoder, attention, moe = architecture.decoder, architecture.attention, architecture.moe
        *parents, _ = self.parameter.split("/")
        hidden = {
            "ffn": decoder.dense_hidden,
            "experts": moe.expert_hidden,
            "shared": moe.expert_hidden * moe.num_shared_experts,
        }
        return {
            "V": decoder.vocab_size,
            "D": decoder.d_model,
            "L": decoder.num_dense_layers if parents[:1] == ["dense"] else decoder.num_moe_layers,
            "E": moe.num_experts,
            "I": 2,
            "F": hidden.get(parents[-1], 0) if parents else 0,
            "H": attention.num_heads,
            "G": attention.num_kv_heads,
            "A": attention.head_dim,
        }

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Shape of the stacked parameter."""
        sizes = self._sizes(architecture)
        return tuple(sizes[letter] for letter in self.letters)

    def stored_shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Shape of each of its tensors in the checkpoint."""
        sizes = self._sizes(architecture)
        return tuple(math.prod(sizes[letter] for letter in together) for together in self.stored.split())

    def _named(self) -> list[str]:
        return [letter for letter in self.letters if f"{{{letter}}}" in self.tensor]

    def num_tensors(self, architecture: Architecture) -> int:
        """How many tensors of a checkpoint hold this parameter."""
        sizes = self._sizes(architecture)
        return math.prod(sizes[letter] for letter in self._named())

    def placements(self, architecture: Architecture) -> Iterator[Placement]:
        """Yields every tensor of this parameter, with the slice that it fills."""
        named = self._named()
        sizes = self._sizes(architecture)
        first_layer = 0 if self.parameter.startswith("dense/") else architecture.decoder.num_dense_layers
        for position in np.ndindex(*(sizes[letter] for letter in named)):
            at = dict(zip(named, position, strict=True))
            spelled = {**at, "L": first_layer + at.get("L", 0), "I": ("gate_proj", "up_proj")[at.get("I", 0)]}
            yield Placement(
                self.tensor.format(**spelled), tuple(at.get(letter, slice(None)) for letter in self.letters)
            )

    def _orders(self) -> tuple[str, str]:
        stored = self.stored.replace(" ", "")
        return stored, "".join(letter for letter in self.letters if letter in stored)

    def from_stored(self, tensor: np.ndarray, architecture: Architecture) -> np.ndarray:
        """Views a stored tensor in the memory order of the slice that it fills."""
        stored, ours = self._orders()
        sizes = self._sizes(architecture)
        return tensor.reshape([sizes[letter] for letter in stored]).transpose([stored.index(x) for x in ours])

    def to_stored(self, part: np.ndarray, architecture: Architecture) -> np.ndarray:
        """Lays a slice of the stacked parameter out as it is stored: contiguous, and a copy where it has to be."""
        stored, ours = self._orders()
        part = np.ascontiguousarray(part.transpose([ours.index(letter) for letter in stored]))
        return part.reshape(self.stored_shape(architecture))


def trunk_rules(decoder: DecoderConfig) -> list[Rule]:
    """Embedding, final norm and, where it is not the embedding again, the head."""
    rules = [Rule("embedding_VD", "model.embed_tokens.weight", "V D"), Rule("norm_D", "model.norm.weight", "D")]
    if not decoder.tie_embeddings:
        rules.append(Rule("head_VD", "lm_head.weight", "V D"))
    return rules


def attention_rules(stack: str, attention: AttentionConfig) -> list[Rule]:
    """Grouped-query attention and the two norms of a layer, under the names that most families share."""
    layer = "model.layers.{L}"
    rules = [
        Rule(f"{stack}/attention_norm_LD", f"{layer}.input_layernorm.weight", "D"),
        Rule(f"{stack}/ffn_norm_LD", f"{layer}.post_attention_layernorm.weight", "D"),
        Rule(f"{stack}/attention/query_LHAD", f"{layer}.self_attn.q_proj.weight", "HA D"),
        Rule(f"{stack}/attention/key_LGAD", f"{layer}.self_attn.k_proj.weight", "GA D"),
        Rule(f"{stack}/attention/value_LGAD", f"{layer}.self_attn.v_proj.weight", "GA D"),
        Rule(f"{stack}/attention/output_LDHA", f"{layer}.self_attn.o_proj.weight", "D HA"),
    ]
    if attention.qk_norm:
        rules += [
            Rule(f"{stack}/attention/query_norm_LA", f"{layer}.self_attn.q_norm.weight", "A"),
            Rule(f"{stack}/attention/key_norm_LA", f"{layer}.self_attn.k_norm.weight", "A"),
        ]
    if attention.bias:
        rules += [
            Rule(f"{stack}/attention/query_bias_LHA", f"{layer}.self_attn.q_proj.bias", "HA"),
            Rule(f"{stack}/attention/key_bias_LGA", f"{layer}.self_attn.k_proj.bias", "GA"),
            Rule(f"{stack}/attention/value_bias_LGA", f"{layer}.self_attn.v_proj.bias", "GA"),
        ]
    return rules


def gated_rules(parameter: str, tensor: str) -> list[Rule]:
    """A gated feed-forward: gate and up projections side by side, and the way down."""
    per_expert = "E" if "{E}" in tensor else ""
    return [
        Rule(f"{parameter}/gate_up_L{per_expert}IFD", f"{tensor}.{{I}}.weight", "F D"),
        Rule(f"{parameter}/down_L{per_expert}DF", f"{tensor}.down_proj.weight", "D F"),
    ]
