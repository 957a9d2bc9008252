"""LoRA (arXiv 2106.09685): a low-rank product added to a weight, one per expert for expert weights."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_MERGED = "merged"
KEPT = jax.checkpoint_policies.save_anything_except_these_names(_MERGED)  # for `jax.checkpoint`: all but merged weights


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "down", "up"), meta_fields=("scale",))
class LowRank:
    """`base + scale * up @ down`, in place of the weight itself.

    The axes of a weight are stacked axes (layers, experts, gate and up), then outputs, then inputs; each stacked matrix
    has its own low-rank product. A layer becomes a plain array when it is taken out of its stack, so at most one layer
    is in memory twice; the backward pass merges it again, see `KEPT`. This saves the memory of gradients and optimizer
    moments, not arithmetic.

    Attributes:
        base: [stacked.., outputs.., inputs..].
        down: float32 [stacked.., rank, inputs..].
        up: float32 [stacked.., outputs.., rank].
        scale: alpha / rank.
    """

    def __init__(self, base: jax.Array, down: jax.Array, up: jax.Array, scale: float):
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def merged(self) -> jax.Array:
        """The weight as a plain array, in the dtype of the base."""
        num_inputs = self.base.ndim - (self.up.ndim - 1)
        num_stacked = self.down.ndim - 1 - num_inputs
        stacked, rank = self.base.shape[:num_stacked], self.up.shape[-1]
        up = self.up.reshape(*stacked, -1, rank)
        down = self.down.reshape(*stacked, rank, math.prod(self.base.shape[self.base.ndim - num_inputs :]))
        product = jnp.matmul(up, down, preferred_element_type=jnp.float32).reshape(self.base.shape)
        merged = (self.base.astype(jnp.float32) + self.scale * product).astype(self.base.dtype)
        return checkpoint_name(merged, _MERGED)


def holds_any(weights) -> bool:
    """Whether some weight of a tree is a `LowRank`."""
    leaves = jax.tree.leaves(weights, is_leaf=lambda weight: isinstance(weight, LowRank))
    return any(isinstance(leaf, LowRank) for leaf in leaves)


def merge(weights):
    """Replaces every `LowRank` in a tree of weights by its merged array."""
    return jax.tree.map(
        lambda weight: weight.merged() if isinstance(weight, LowRank) else weight,
        weights,
        is_leaf=lambda weight: isinstance(weight, LowRank),
    )
