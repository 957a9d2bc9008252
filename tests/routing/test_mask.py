"""The mask of experts: its effect, its gradient, and weights with the mask merged."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.engine.request import execution_of
from moe_jax.model import decoder
from moe_jax.routing import mask, policies
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.selection import Selection
from tests.tiny_model import ARCHITECTURE, random_params


def test_a_masked_expert_loses_its_weight_and_the_others_keep_theirs():
    selection = Selection(jnp.array([[0, 2], [2, 1]]), jnp.array([[0.6, 0.4], [0.7, 0.3]]), jnp.ones((2, 2), bool))
    masked = mask.masked(selection, jnp.array([0.5, 2.0, -1.0]))
    np.testing.assert_allclose(masked.weight_NK, [[0.6, 0.0], [0.0, 0.3]], atol=1e-7)
    assert masked.keep_NK.all()


def test_its_gradient_goes_straight_through_to_the_sigmoid():
    selection = Selection(jnp.array([[0, 2], [2, 1]]), jnp.array([[0.6, 0.4], [0.7, 0.3]]), jnp.ones((2, 2), bool))
    worth_NK = np.array([[1.0, -2.0], [5.0, 3.0]], np.float32)
    mask_E = np.array([0.5, 2.0, -1.0], np.float32)
    gradient = jax.grad(lambda m: (mask.masked(selection, m).weight_NK * worth_NK).sum())(jnp.asarray(mask_E))
    slope = np.exp(-mask_E) / (1 + np.exp(-mask_E)) ** 2
    np.testing.assert_allclose(gradient, slope * [0.6 * 1, 0.3 * 3, 0.4 * -2 + 0.7 * 5], rtol=1e-5)


def test_merged_weights_give_the_same_without_the_mask():
    params = random_params()
    mask_LE = np.where(np.random.default_rng(0).random((2, 16)) < 0.4, -0.3, 0.7).astype(np.float32)
    with_mask = params | {"moe": params["moe"] | {"router": params["moe"]["router"] | {"mask_LE": mask_LE}}}
    merged = mask.merge(with_mask)
    assert jax.tree.structure(merged) == jax.tree.structure(params) and mask.merge(params) is params
    execution = execution_of(ARCHITECTURE)
    live = policies.settings([parse("topk:4")] * 2, ARCHITECTURE, execution.k_max)
    tokens_BT = np.random.default_rng(1).integers(0, 512, (2, 12), np.int32)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    hidden = jax.jit(lambda params: decoder.hidden(params, tokens_BT, places, np.ones_like(places), live, execution)[0])
    found = [np.asarray(hidden(one)) for one in (with_mask, merged, params)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-2
