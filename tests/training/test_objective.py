"""The loss and its gradients against textbook definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training import objective


@pytest.mark.parametrize("num_tokens", [1, 7, 24])
def test_cross_entropy(monkeypatch, num_tokens):
    monkeypatch.setattr(objective, "CHUNK_TOKENS", 8)
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((num_tokens, 6), np.float32), rng.standard_normal((31, 6), np.float32)
    labels, weight = rng.integers(31, size=num_tokens), rng.random(num_tokens, np.float32)
    loss, gradients = jax.value_and_grad(lambda *a: 3 * objective.cross_entropy(*a, labels, weight), argnums=(0, 1))(
        x, head
    )
    wanted, x_grad, head_grad = 0.0, np.zeros_like(x), np.zeros_like(head)
    for row, label, share, into in zip(x.astype(np.float64), labels, weight, x_grad):
        logits = head @ row
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        wanted -= 3 * share * np.log(probability[label])
        off = 3 * share * (probability - (np.arange(31) == label))
        into += off @ head
        head_grad += np.outer(off, row)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], x_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], head_grad, rtol=1e-4, atol=1e-5)


def test_logits_are_never_whole():
    """No array of the compiled loss is as large as all logits together."""
    num_tokens, d_model, vocab = 8192, 16, 4096
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_tokens, d_model), (vocab, d_model))]
    labels, weight = jax.ShapeDtypeStruct((num_tokens,), jnp.int32), jax.ShapeDtypeStruct((num_tokens,), jnp.float32)
    gradient = jax.grad(lambda *a: objective.cross_entropy(*a), argnums=(0, 1))
    compiled = jax.jit(gradient).lower(*shapes, labels, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < num_tokens * vocab * 4 / 2
