"""Copies tokens to sorted rows, and adds up the weighted results; both use gathers only.

Slots and sorted rows correspond one to one, so the gradient of each gather is another gather, not a scatter, which XLA
runs row by row on a CPU.
"""

import jax
import jax.numpy as jnp


def _rows(x_ND: jax.Array, index: jax.Array) -> jax.Array:
    return x_ND.at[index].get(mode="promise_in_bounds")


@jax.custom_vjp
def spread(x_ND: jax.Array, token_S: jax.Array, position_NK: jax.Array) -> jax.Array:
    """Copies to each sorted row its token.

    Args:
        x_ND: activations.
        token_S: int32, the token of each sorted row.
        position_NK: int32, the sorted row of each slot; read by the gradient.

    Returns:
        rows_SD.
    """
    return _rows(x_ND, token_S)


def _spread_forward(x_ND, token_S, position_NK):
    return spread(x_ND, token_S, position_NK), position_NK


def _spread_backward(position_NK, rows_grad_SD):
    x_grad_ND = _rows(rows_grad_SD, position_NK).sum(axis=1, dtype=jnp.float32).astype(rows_grad_SD.dtype)
    return x_grad_ND, None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(out_SD: jax.Array, weight_NK: jax.Array, token_S: jax.Array, position_NK: jax.Array) -> jax.Array:
    """Adds up each token's slots, weighted, in float32: the only place where mixing weights are applied.

    Args:
        out_SD: unweighted outputs of the experts; rows of dropped slots are zero.
        weight_NK: float32 mixing weights, zero for dropped slots.
        token_S: int32, the token of each sorted row; read by the gradient.
        position_NK: int32, the sorted row of each slot.

    Returns:
        y_ND in the dtype of `out_SD`.
    """
    y_ND = (_rows(out_SD, position_NK).astype(jnp.float32) * weight_NK[:, :, None]).sum(axis=1)
    return y_ND.astype(out_SD.dtype)


def _combine_forward(out_SD, weight_NK, token_S, position_NK):
    return combine(out_SD, weight_NK, token_S, position_NK), (out_SD, weight_NK, token_S, position_NK)


def _combine_backward(residuals, y_grad_ND):
    out_SD, weight_NK, token_S, position_NK = residuals
    weight_S = jnp.zeros(position_NK.size, jnp.float32).at[position_NK.reshape(-1)].set(weight_NK.reshape(-1))
    y_grad_SD = _rows(y_grad_ND, token_S).astype(jnp.float32)
    out_grad_SD = (y_grad_SD * weight_S[:, None]).astype(out_SD.dtype)
    weight_grad_S = (out_SD.astype(jnp.float32) * y_grad_SD).sum(axis=1)
    return out_grad_SD, _rows(weight_grad_S, position_NK), None, None


combine.defvjp(_combine_forward, _combine_backward)
