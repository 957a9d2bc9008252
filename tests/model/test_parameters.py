"""The table of parameters: everything that follows from an entry, and the Flax module made from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax import checkpoint
from moe_jax.checkpoint import families
from moe_jax.checkpoint.names import Rule
from moe_jax.config.finetuning import FinetuneConfig
from moe_jax.config.schema import TrainingConfig
from moe_jax.cost import roofline
from moe_jax.dims import LETTERS
from moe_jax.model import parameters
from moe_jax.model.decoder import Decoder, split
from moe_jax.study.random_model import random_params
from moe_jax.training import trainable
from moe_jax.training.optimizer import make_optimizer, without_selection_bias
from tests import tiny_model

ARCHITECTURE = tiny_model.ARCHITECTURE
NEW = parameters.Parameter("moe/extra_LD", parameters.Matrix, "D")


def test_every_letter_has_a_meaning_and_every_path_one_entry():
    assert all(set(one.letters) | set(one.inputs) <= set(LETTERS) for one in parameters.TABLE)
    assert all(one.letters.endswith(one.inputs) for one in parameters.TABLE)
    assert all(bool(one.inputs) == (one.kind is parameters.Matrix) for one in parameters.TABLE)
    assert len({one.path for one in parameters.TABLE}) == len(parameters.TABLE)


def test_a_path_is_found_by_itself_or_by_a_path_within_it():
    assert parameters.find(["moe", "experts", "down_LEDF", "up"]).path == "moe/experts/down_LEDF"
    assert parameters.find(["moe", "attention_norm_LD"]).kind is parameters.Norm
    with pytest.raises(KeyError):
        parameters.find(["moe", "experts"])
    with pytest.raises(KeyError):
        parameters.find(["norm_DD"])


@pytest.fixture
def with_new(monkeypatch):
    """Adds a weight: an entry in a copy of the table, and the name of its tensor."""
    monkeypatch.setattr(parameters, "TABLE", (*parameters.TABLE, NEW))
    family = families.FAMILIES["glm4_moe"]
    rule = Rule(NEW.path, "model.layers.{L}.extra.weight", "D")
    more = dataclasses.replace(family, rules=lambda architecture: (*family.rules(architecture), rule))
    monkeypatch.setitem(families.FAMILIES, "glm4_moe", more)


def test_a_new_weight_needs_one_entry_and_the_name_of_its_tensor(with_new, tmp_path):
    layers, d_model = ARCHITECTURE.decoder.num_moe_layers, ARCHITECTURE.decoder.d_model
    initial = jax.jit(lambda: split(Decoder(ARCHITECTURE, nnx.Rngs(0))))()
    extra = initial["moe"]["extra_LD"]
    assert extra.shape == (layers, d_model) and 0 < np.std(extra) < 2 * d_model**-0.5
    assert np.std(random_params(ARCHITECTURE, jnp.float32, 0)["moe"]["extra_LD"]) > 0
    counted = sum(leaf.size for leaf in jax.tree.leaves(initial))
    assert counted == parameters.count(ARCHITECTURE)
    step = roofline.Step([0], [1], 8.0, 8.0)
    without = layers * d_model
    work = roofline.work(ARCHITECTURE, step, 4)
    parameters.TABLE = parameters.TABLE[:-1]  # the project's table without the new entry; the fixture restores it
    assert work == (
        roofline.Work(*np.add(dataclasses.astuple(roofline.work(ARCHITECTURE, step, 4)), (4 * without, 2 * without)))
    )
    parameters.TABLE = (*parameters.TABLE, NEW)

    tree, _ = without_selection_bias(initial)
    trained, _ = trainable.divide(tree, FinetuneConfig(), "float32", 0)
    rule = make_optimizer(TrainingConfig(steps=1, warmup_steps=0, weight_decay=0.5, learning_rate=0.1))
    zeros = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = jax.jit(lambda trained: rule.update(zeros, rule.init(trained), trained))(trained)
    np.testing.assert_allclose(updates["moe"]["extra_LD"], -0.05 * extra, rtol=1e-5)
    assert not np.any(updates["moe"]["ffn_norm_LD"])

    tiny_model.write_model(tmp_path / "model", params=jax.tree.map(np.asarray, initial), model_type="glm4_moe")
    loaded = checkpoint.open(tmp_path / "model").read()
    np.testing.assert_array_equal(loaded["moe"]["extra_LD"], extra)


def test_the_module_is_called_filtered_and_differentiated():
    decoder = nnx.jit(Decoder, static_argnums=0)(ARCHITECTURE, nnx.Rngs(0))
    kinds = {kind: nnx.to_pure_dict(nnx.state(decoder, kind)) for kind in (parameters.Matrix, parameters.Norm)}
    assert set(kinds[parameters.Norm]) == {"dense", "moe", "norm_D"}
    assert set(kinds[parameters.Matrix]) == {"dense", "moe", "embedding_VD"}
    assert decoder.moe.experts.down_LEDF.letters == "LEDF"
    tokens_BT = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)

    def loss(decoder):
        return optax.softmax_cross_entropy_with_integer_labels(decoder(tokens_BT), tokens_BT).mean()

    gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, parameters.Matrix)))(decoder)
    assert set(nnx.to_pure_dict(gradient)) == set(kinds[parameters.Matrix])
    assert np.any(gradient["moe"]["experts"]["down_LEDF"][...] != 0)
    call = nnx.jit(lambda decoder, tokens_BT: decoder(tokens_BT))
    before, later = call(decoder, tokens_BT), call(decoder, tokens_BT.at[0, 3].set(9))
    np.testing.assert_array_equal(before[0, :3], later[0, :3])
    assert not np.array_equal(before[0, 3], later[0, 3])
