"""The table of a decoder's parameters: path, dimensions, kind and random initialisation of each.

Everything that needs to know a parameter reads this table: initialisation, shapes of checkpoints, counts of bytes and
operations, which parameters decay, which train, and which may be read within a stack. Matrices have outputs first, as
checkpoints store them: stacked axes (layers, experts, gate and up), then outputs, then inputs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture, AttentionConfig

_STACKED = "LEI"


class Matrix(nnx.Param):
    """One or more matrices. Weight decay applies, and LoRA may adapt it."""


class Norm(nnx.Param):
    """The scale of a norm."""


class Bias(nnx.Param):
    """Added to the result of a product."""


class SelectionBias(nnx.Variable):
    """Added to the scores of experts when they are selected. Updated by load balancing; it has no gradient."""


class Mask(nnx.Param):
    """A weight per expert, present only while a mask is trained."""


Kind = type[nnx.Variable]


def _always(architecture: Architecture) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter, for all layers of a stack.

    Attributes:
        path: in the tree, such as `moe/experts/down_LEDF`; the letters (`dims.py`) are its dimensions. The table writes
            `moe/...` for every stack of MoE layers.
        kind: a matrix, a norm, a bias ...
        inputs: for a matrix, the letters that its product sums over.
        gain: for a matrix, its initial standard deviation times the square root of its number of inputs.
        present: whether a model of an architecture has it.
    """

    path: str
    kind: Kind
    inputs: str = ""
    gain: Callable[[Architecture], float] = lambda architecture: 1.0
    present: Callable[[Architecture], bool] = _always

    @property
    def modules(self) -> tuple[str, ...]:
        """The path without the name."""
        return tuple(self.path.split("/")[:-1])

    @property
    def letters(self) -> str:
        """One letter for each dimension."""
        return self.path.rsplit("_", 1)[1]

    @property
    def num_stacked(self) -> int:
        """Number of leading stacked dimensions: layers, experts, gate and up."""
        return len(self.letters) - len(self.letters.lstrip(_STACKED))

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        """The size of each dimension."""
        sizes = sizes_of(architecture, self.modules)
        return tuple(sizes[letter] for letter in self.letters)

    def size(self, architecture: Architecture) -> int:
        """The number of its elements."""
        return math.prod(self.shape(architecture))

    def initialize(self, architecture: Architecture, rngs: nnx.Rngs) -> nnx.Variable:
        """Initial values in float32: normal for a matrix, one for a norm, zero for a bias; letters as metadata."""
        shape = self.shape(architecture)
        if self.kind is not Matrix:
            return self.kind(jnp.full(shape, 1.0 if self.kind is Norm else 0.0, jnp.float32), letters=self.letters)
        sizes = sizes_of(architecture, self.modules)
        deviation = self.gain(architecture) / math.prod(sizes[letter] for letter in self.inputs) ** 0.5
        return Matrix(jax.random.normal(rngs.params(), shape, jnp.float32) * deviation, letters=self.letters)


def sizes_of(architecture: Architecture, modules: Sequence[str]) -> dict[str, int]:
    """The size of each letter for the parameters of a module, such as ("moe", "experts")."""
    decoder, attention, stack = architecture.decoder, architecture.attention, modules[0] if modules else layer_order.MOE
    moe = layer_order.moe_of(architecture, stack)
    hidden = {"ffn": decoder.dense_hidden, "experts": moe.expert_hidden, "shared": moe.shared_width}
    return {
        "V": decoder.vocab_size,
        "D": decoder.d_model,
        "L": len(layer_order.stacks(architecture).get(stack, ())),
        "E": moe.num_experts,
        "I": 2,
        "F": hidden.get(modules[-1], 0) if modules else 0,
        "H": attention.num_heads,
        "G": attention.num_kv_heads,
        **_attention_sizes(attention),
    }


def _attention_sizes(attention: AttentionConfig) -> dict[str, int]:
    if attention.kind == "grouped":
        return {"A": attention.head_dim}
    return {
        "A": attention.nope_head_dim + attention.rope_head_dim,
        "X": attention.value_head_dim,
        "O": attention.nope_head_dim + attention.value_head_dim,
        "U": attention.query_rank,
        "Z": attention.latent_rank,
        "W": attention.latent_rank + attention.rope_head_dim,
    }


def _residual(architecture: Architecture) -> float:
    """Keeps the variance of the residual stream constant over depth."""
    return (2 * architecture.decoder.num_layers) ** -0.5


def _latent(architecture: Architecture) -> bool:
    return architecture.attention.kind == "latent"


def _grouped(architecture: Architecture) -> bool:
    return architecture.attention.kind == "grouped"


def _query_latent(architecture: Architecture) -> bool:
    return _latent(architecture) and architecture.attention.query_rank > 0


def _whole_query(architecture: Architecture) -> bool:
    return not _query_latent(architecture)


def _biased(architecture: Architecture) -> bool:
    return _grouped(architecture) and architecture.attention.bias


def _normed(architecture: Architecture, span: str) -> bool:
    attention = architecture.attention
    return _grouped(architecture) and attention.qk_norm and attention.qk_norm_span == span


def _shared(architecture: Architecture) -> bool:
    return architecture.moe.num_shared_experts > 0


def _attention(stack: str) -> list[Parameter]:
    """Attention and the two norms of the layers of a stack."""
    normed_over_all, normed_per_head = (functools.partial(_normed, span=span) for span in ("all", "head"))
    at = f"{stack}/attention"
    return [
        Parameter(f"{stack}/attention_norm_LD", Norm),
        Parameter(f"{at}/query_down_LUD", Matrix, "D", present=_query_latent),
        Parameter(f"{at}/query_latent_norm_LU", Norm, present=_query_latent),
        Parameter(f"{at}/query_up_LHAU", Matrix, "U", present=_query_latent),
        Parameter(f"{at}/query_LHAD", Matrix, "D", present=_whole_query),
        Parameter(f"{at}/key_LGAD", Matrix, "D", present=_grouped),
        Parameter(f"{at}/value_LGAD", Matrix, "D", present=_grouped),
        Parameter(f"{at}/output_LDHA", Matrix, "HA", _residual, present=_grouped),
        Parameter(f"{at}/query_bias_LHA", Bias, present=_biased),
        Parameter(f"{at}/key_bias_LGA", Bias, present=_biased),
        Parameter(f"{at}/value_bias_LGA", Bias, present=_biased),
        Parameter(f"{at}/query_norm_LHA", Norm, present=normed_over_all),
        Parameter(f"{at}/key_norm_LGA", Norm, present=normed_over_all),
        Parameter(f"{at}/query_norm_LA", Norm, present=normed_per_head),
        Parameter(f"{at}/key_norm_LA", Norm, present=normed_per_head),
        Parameter(f"{at}/latent_LWD", Matrix, "D", present=_latent),
        Parameter(f"{at}/latent_norm_LZ", Norm, present=_latent),
        Parameter(f"{at}/key_value_up_LHOZ", Matrix, "Z", present=_latent),
        Parameter(f"{at}/output_LDHX", Matrix, "HX", _residual, present=_latent),
        Parameter(f"{stack}/ffn_norm_LD", Norm),
    ]


def _with_dense_layers(parameter: Parameter) -> Parameter:
    return dataclasses.replace(
        parameter,
        present=lambda architecture: architecture.decoder.num_dense_layers > 0 and parameter.present(architecture),
    )


# In the order of initialisation.
TABLE = (
    Parameter("embedding_VD", Matrix, "D", lambda architecture: 0.5),
    *map(_with_dense_layers, _attention("dense")),
    _with_dense_layers(Parameter("dense/ffn/gate_up_LIFD", Matrix, "D")),
    _with_dense_layers(Parameter("dense/ffn/down_LDF", Matrix, "F", _residual)),
    *_attention("moe"),
    Parameter("moe/router/weight_LED", Matrix, "D"),
    Parameter("moe/router/bias_LE", SelectionBias, present=lambda architecture: architecture.moe.selection_bias),
    Parameter("moe/router/mask_LE", Mask, present=lambda architecture: False),
    Parameter("moe/experts/gate_up_LEIFD", Matrix, "D"),
    Parameter("moe/experts/down_LEDF", Matrix, "F", _residual),
    Parameter("moe/shared/gate_up_LIFD", Matrix, "D", present=_shared),
    Parameter("moe/shared/down_LDF", Matrix, "F", _residual, present=_shared),
    Parameter("moe/shared_gate_LD", Matrix, "D", present=lambda architecture: architecture.moe.shared_gate),
    Parameter("norm_D", Norm),
    Parameter("head_VD", Matrix, "D", present=lambda architecture: not architecture.decoder.tie_embeddings),
)


def of(architecture: Architecture) -> list[Parameter]:
    """The parameters of a model; those of MoE layers once for each stack of MoE layers."""
    moe_stacks = layer_order.moe_stacks(layer_order.stacks(architecture))
    found = []
    for parameter in TABLE:
        if parameter.present(architecture):
            within = parameter.path.removeprefix(f"{layer_order.MOE}/")
            others = [] if within == parameter.path else [f"{stack}/{within}" for stack in moe_stacks[1:]]
            found += [parameter, *(dataclasses.replace(parameter, path=path) for path in others)]
    return found


def find(path: Iterable[str]) -> Parameter:
    """The entry for the path of a parameter or of something within it, such as a LoRA factor; KeyError if none."""
    stack, slash, within = "/".join(path).partition("/")
    kind = layer_order.kind_of(stack)
    path = kind + slash + within
    for parameter in TABLE:
        if path.startswith(parameter.path) and path[len(parameter.path) :][:1] in ("", "/"):
            same = stack == kind
            return parameter if same else dataclasses.replace(parameter, path=stack + parameter.path.removeprefix(kind))
    raise KeyError(path)


def find_key(path: Sequence[Any]) -> Parameter:
    """`find` for a path of `jax.tree_util`, of a parameter or of an array within one."""
    return find(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def count(architecture: Architecture, included: Callable[[Parameter], bool] = lambda parameter: True) -> int:
    """The number of elements of a model's parameters, or of those for which `included` holds."""
    return sum(parameter.size(architecture) for parameter in of(architecture) if included(parameter))


def is_routed(parameter: Parameter) -> bool:
    """Whether it is of the routed experts."""
    return "experts" in parameter.modules


def count_expert(architecture: Architecture) -> int:
    """The number of parameters of one routed expert: gate, up and down."""
    return count(architecture, is_routed) // sum(architecture.num_experts_L)


def count_active(architecture: Architecture) -> int:
    """The number of parameters that one token uses: the model's own k of its routed experts, and all others.

    Both embeddings count in full, as most publishers do.
    """
    unused = sum(architecture.num_experts_L) - sum(architecture.k_L)
    return count(architecture) - unused * count_expert(architecture)


def shapes(architecture: Architecture, dtype: jnp.dtype = jnp.float32) -> dict[str, Any]:
    """The tree of a model's parameters as nested dicts of shapes."""
    tree: dict[str, Any] = {}
    for parameter in of(architecture):
        node = tree
        for module in parameter.modules:
            node = node.setdefault(module, {})
        node[parameter.path.rsplit("/", 1)[-1]] = jax.ShapeDtypeStruct(parameter.shape(architecture), dtype)
    return tree
