"""Spreading and combining, and their gradients, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels.combine import reference
from moe_jax.kernels.combine.api import combine, spread

N, K, D = 13, 3, 8


def random_inputs(seed=0):
    rng = np.random.default_rng(seed)
    position_NK = rng.permutation(N * K).reshape(N, K).astype(np.int32)
    token_S = np.empty(N * K, np.int32)
    token_S[position_NK.reshape(-1)] = np.repeat(np.arange(N), K)
    x_ND = rng.standard_normal((N, D)).astype(np.float32)
    out_SD = rng.standard_normal((N * K, D)).astype(np.float32)
    weight_NK = rng.random((N, K)).astype(np.float32)
    return x_ND, out_SD, weight_NK, token_S, position_NK


def test_forward():
    x_ND, out_SD, weight_NK, token_S, position_NK = random_inputs()
    np.testing.assert_array_equal(jax.jit(spread)(x_ND, token_S, position_NK), reference.spread(x_ND, token_S))
    got = jax.jit(combine)(out_SD, weight_NK, token_S, position_NK)
    np.testing.assert_allclose(got, reference.combine(out_SD, weight_NK, position_NK), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_definition():
    """Against plain loops; both are linear in the arrays, and bilinear with the weight."""
    x_ND, out_SD, weight_NK, token_S, position_NK = random_inputs()
    rng = np.random.default_rng(1)
    rows_grad_SD = rng.standard_normal(out_SD.shape).astype(np.float32)
    _, pull = jax.vjp(lambda x: spread(x, token_S, position_NK), jnp.asarray(x_ND))
    expected = np.zeros_like(x_ND)
    for row, token in enumerate(token_S):
        expected[token] += rows_grad_SD[row]
    np.testing.assert_allclose(pull(jnp.asarray(rows_grad_SD))[0], expected, rtol=1e-5, atol=1e-5)

    y_grad_ND = rng.standard_normal(x_ND.shape).astype(np.float32)
    _, pull = jax.vjp(lambda out, weight: combine(out, weight, token_S, position_NK), jnp.asarray(out_SD), weight_NK)
    out_grad_SD, weight_grad_NK = pull(jnp.asarray(y_grad_ND))
    expected_out, expected_weight = np.zeros_like(out_SD), np.zeros_like(weight_NK)
    for token in range(N):
        for slot in range(K):
            row = position_NK[token, slot]
            expected_out[row] += weight_NK[token, slot] * y_grad_ND[token]
            expected_weight[token, slot] = out_SD[row] @ y_grad_ND[token]
    np.testing.assert_allclose(out_grad_SD, expected_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weight_grad_NK, expected_weight, rtol=1e-5, atol=1e-5)
