"""Which parameters of a checkpoint are in eight bits in memory: those of the routed experts, if that is asked for."""

import jax
import numpy as np

from moe_jax.checkpoint.quantization import FLOAT8, Blocks
from moe_jax.checkpoint.reading import Stack
from moe_jax.config.schema import EXPERT_DTYPES
from moe_jax.kernels import quantized
from moe_jax.model import parameters


def with_experts_in(expert_dtype: str, stacks: list[Stack], blocks: Blocks | None) -> list[Stack]:
    """The locations of parameters, with those of the routed experts in eight bits if that is asked for.

    Args:
        expert_dtype: as `Checkpoint.load` takes it.
        stacks: as arrays.
        blocks: the size of the blocks that share a scale, if tensors are quantised.
    """
    require_expert_dtype(expert_dtype)
    routed = {stack.path: stack for stack in stacks if parameters.is_routed(parameters.find([stack.path]))}
    if expert_dtype == "auto":
        as_stored = keeps_stored() and all(
            piece.stored.dtype == FLOAT8 for stack in routed.values() for piece in stack.pieces
        )
        expert_dtype = quantized.FLOAT8 if as_stored else "model"
    if expert_dtype == "model":
        return stacks

    def in_eight_bits(stack: Stack) -> Stack:
        block = quantized.block_of(expert_dtype, *stack.shape[-2:])
        if expert_dtype == quantized.FLOAT8 and blocks is not None:
            block = blocks
        return stack._replace(dtype=np.dtype(expert_dtype), block=Blocks(*block), mapped=False)

    return [in_eight_bits(stack) if stack.path in routed else stack for stack in stacks]


def keeps_stored() -> bool:
    """Whether "auto" keeps experts as they are stored: not on a GPU, whose fast kernels take no eight bits."""
    return jax.default_backend() != "gpu"


def require_expert_dtype(expert_dtype: str) -> None:
    """Raises ValueError if `expert_dtype` is not a known setting."""
    if expert_dtype not in EXPERT_DTYPES:
        raise ValueError(f"expert_dtype = {expert_dtype!r}: expected one of {', '.join(EXPERT_DTYPES)}")
