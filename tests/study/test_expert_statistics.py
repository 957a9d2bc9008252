"""The statistics of experts against a plain loop over tokens."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.study import expert_statistics
from moe_jax.study.expert_statistics import ROWS, CalibrationRows
from tests import tiny_model
from tests.family_variants import write
from tests.model import plain_loop
from tests.model.test_unlike_layers import ARCHITECTURE, EXPERTS_L, K_L, VARIANT

LENGTHS = (13, 5, 13, 0, 13, 13, 5, 13, 13)  # tokens of each row, the rest of which is padding


def rows_of(vocab_size):
    documents = [np.random.default_rng(n).integers(2, vocab_size, size) for n, size in enumerate(LENGTHS)]
    return expert_statistics.rows_of(documents, 13, 1000)


def test_rows_are_the_starts_of_documents_until_there_are_enough_tokens():
    documents = [np.arange(10, 15), np.arange(20, 22), np.arange(30, 39), np.arange(40, 41)]
    read = []
    rows = expert_statistics.rows_of((read.append(one[0]) or one for one in documents), 4, 9)
    assert rows.tokens_JT.shape == (ROWS, 4) and read == [10, 20, 30]
    assert [row[valid].tolist() for row, valid in zip(*rows)][:4] == [[10, 11, 12, 13], [20, 21], [30, 31, 32], []]


def token_sums(x_D, h_D, tensors, name, k):
    """The four numbers of each chosen expert, for one token."""
    logits_E = x_D @ tensors[f"{name}.gate.weight"].T
    share_E = np.exp(logits_E - logits_E.max())
    share_E = share_E / share_E.sum()
    chosen = np.argsort(-share_E)[:k]
    out, weight = {}, {}
    for expert in chosen:
        gate, up, down = (tensors[f"{name}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        gated = gate @ x_D
        out[expert] = down @ (gated / (1 + np.exp(-gated)) * (up @ x_D))
        weight[expert] = share_E[expert] / (share_E[chosen].sum() if ARCHITECTURE.moe.normalize else 1)
    y_D = sum(weight[expert] * out[expert] for expert in chosen)
    after_D = h_D + y_D
    contribution = 1 - h_D @ after_D / np.linalg.norm(h_D) / np.linalg.norm(after_D)
    for expert in chosen:
        size = weight[expert] * np.linalg.norm(out[expert])
        yield expert, np.array([1, weight[expert], size, contribution * size])


def plain_sums(tensors, rows):
    """(MoE layer, expert) -> the four sums, without padding, in float64."""
    architecture, sums = ARCHITECTURE, collections.defaultdict(lambda: np.zeros(4))
    eps, as_jax = architecture.decoder.norm_eps, {name: jnp.asarray(one) for name, one in tensors.items()}
    for tokens_T, valid_T in zip(*rows):
        x_TD, column = as_jax["model.embed_tokens.weight"][tokens_T[valid_T]], 0
        for layer in range(architecture.decoder.num_layers if valid_T.any() else 0):
            name = f"model.layers.{layer}"
            normed_TD = plain_loop.norm(x_TD, as_jax[f"{name}.input_layernorm.weight"], eps)
            x_TD = x_TD + plain_loop.attention(normed_TD, as_jax, f"{name}.self_attn", architecture)
            normed_TD = plain_loop.norm(x_TD, as_jax[f"{name}.post_attention_layernorm.weight"], eps)
            if f"{name}.mlp.gate.weight" not in tensors:
                x_TD = x_TD + plain_loop.gated(normed_TD, as_jax, f"{name}.mlp")
                continue
            for normed_D, h_D in zip(np.float64(normed_TD), np.float64(x_TD)):
                for expert, numbers in token_sums(normed_D, h_D, tensors, f"{name}.mlp", K_L[column]):
                    sums[column, expert] += numbers
            x_TD = x_TD + plain_loop.sparse(normed_TD, as_jax, f"{name}.mlp", K_L[column], architecture.moe.normalize)
            column += 1
    return sums


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("unlike") / "model", VARIANT, dtype="float32")


def test_statistics_equal_a_plain_loop(folder):
    """In layers with different numbers of experts and k; padding counts nowhere."""
    rows = rows_of(ARCHITECTURE.decoder.vocab_size)
    found = expert_statistics.measure(checkpoint.open(folder).load("float32"), rows, execution_of(ARCHITECTURE))
    with jax.numpy_rank_promotion("allow"):
        expected = plain_sums(safetensors.numpy.load_file(folder / "model.safetensors"), rows)
    assert found.count_LE.sum() == sum(LENGTHS) * sum(K_L)
    for layer, experts in enumerate(EXPERTS_L):
        for expert in range(ARCHITECTURE.moe.num_experts):
            numbers = np.array([field_LE[layer, expert] for field_LE in found])
            np.testing.assert_allclose(numbers, expected[layer, expert], rtol=2e-4, atol=1e-6, err_msg=(layer, expert))
            assert expert < experts or not numbers.any()


def test_counts_and_weights_of_a_router_with_sigmoid_and_bias():
    """As many as the layers themselves report, and weights that sum to one per token."""
    architecture, params = tiny_model.ARCHITECTURE, tiny_model.random_params()
    rows, execution = rows_of(512), execution_of(architecture)
    found = expert_statistics.measure(params, rows, execution)
    live = policies.settings([MODEL_OWN] * len(rows.tokens_JT), architecture, execution.k_max)
    positions_JT = np.broadcast_to(np.arange(13, dtype=np.int32), rows.tokens_JT.shape)
    inputs = rows.tokens_JT, positions_JT, rows.valid_JT.astype(np.int32)
    _, use = decoder.hidden(params, *inputs, live, execution)
    np.testing.assert_array_equal(found.count_LE, use.load_E)
    np.testing.assert_allclose(found.weight_LE.sum(axis=1), sum(LENGTHS), rtol=1e-5)
    assert (found.weighted_norm_LE > 0).all() and (found.contribution_LE > 0).all()


def test_batches_add_up():
    architecture, params, rows = tiny_model.ARCHITECTURE, tiny_model.random_params(), rows_of(512)
    whole = expert_statistics.measure(params, rows, execution_of(architecture))
    halves = [CalibrationRows(*(part[first : first + ROWS] for part in rows)) for first in (0, ROWS)]
    one, other = (expert_statistics.measure(params, half, execution_of(architecture)) for half in halves)
    for total, first, second in zip(whole, one, other, strict=True):
        np.testing.assert_allclose(total, first + second)
