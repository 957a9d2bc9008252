"""A projection as a grouped matmul with one expert for all rows."""

import math

import jax
import jax.numpy as jnp


def grouped(x: jax.Array, stack: jax.Array, contracted: int) -> tuple[jax.Array, jax.Array, jax.Array, tuple[int, ...]]:
    """(rows_SD in the dtype of the stack, the stack as [L, 1, F, D], the size of the group, the shape of the result).

    Arguments are those of `api.projection`.
    """
    outputs, inputs = stack.shape[1 : stack.ndim - contracted], stack.shape[stack.ndim - contracted :]
    rows_SD = x.reshape(-1, math.prod(inputs)).astype(stack.dtype)
    stack_LEFD = stack.reshape(len(stack), 1, math.prod(outputs), math.prod(inputs))
    size_E = jnp.array([len(rows_SD)], jnp.int32)
    return rows_SD, stack_LEFD, size_E, (*x.shape[: x.ndim - contracted], *outputs)
