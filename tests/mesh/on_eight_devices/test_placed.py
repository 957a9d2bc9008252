"""A model whose experts are placed by measured loads computes what it computes without, from any layout of weights."""

import json
import re

import numpy as np
import pytest

import moe_jax
from moe_jax import conversion
from moe_jax.checkpoint import filling
from moe_jax.config.mesh import MeshConfig
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.report.figures import csv_text
from moe_jax.routing.policies.parse import MODEL_OWN
from tests import launcher_module

EXPERTS, LAYERS = 16, 2
TOKENS_BT = np.random.default_rng(0).integers(0, 320, (5, 13))
LOAD_LE = np.random.default_rng(1).integers(1, 100, (LAYERS, EXPERTS)) * np.array([1, 5] + [1] * 14)


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """A file as launch/evaluate.py writes it, with the loads of two policies."""
    path = tmp_path_factory.mktemp("loads") / "expert_load.csv"
    lines = [["model", layer, *row] for layer, row in enumerate(LOAD_LE)]
    lines += [["topk:1", layer, *row] for layer, row in enumerate(0 * LOAD_LE)]
    path.write_text(csv_text(["policy", "moe_layer", *range(EXPERTS)], lines))
    return str(path)


def placed(loads, **settings):
    return MeshConfig(**{"data": 2, "expert": 4, "placement": loads, "replicas": 8} | settings)


@pytest.mark.parametrize("dispatch", ["replicated", "all_to_all"])
def test_logits_do_not_change(folder, loads, dispatch):
    expected_BTV = moe_jax.load(folder).logits(TOKENS_BT)
    model = moe_jax.load(folder, mesh=placed(loads, dispatch=dispatch))
    logits_BTV = model.logits(TOKENS_BT)
    assert np.linalg.norm(logits_BTV - expected_BTV) < 1e-5 * np.linalg.norm(expected_BTV)


@pytest.mark.parametrize("layout", ["huggingface", "stacked"])
def test_each_device_reads_the_experts_that_are_placed_on_it(folder, loads, layout, tmp_path, monkeypatch):
    if layout == "stacked":
        conversion.convert(folder, tmp_path / "stacked", layout="stacked")
        folder = tmp_path / "stacked"
    expected = moe_jax.load(folder).params["moe"]["experts"]
    sources, fill = [], filling.fill
    monkeypatch.setattr(filling, "fill", lambda given: [sources.extend(given), fill(given)][1])
    model = moe_jax.load(folder, mesh=placed(loads))
    held_LE = model.layout.placement.held_LE
    assert held_LE.shape == (LAYERS, EXPERTS + 8)
    assert (np.bincount(held_LE[0], minlength=EXPERTS)[LOAD_LE[0].argmax()]) > 1
    experts = model.params["moe"]["experts"]
    for name, array in experts.items():
        placed_experts = np.stack([np.asarray(expected[name])[layer, held_E] for layer, held_E in enumerate(held_LE)])
        np.testing.assert_array_equal(np.asarray(array), placed_experts)
        assert array.sharding.shard_shape(array.shape)[1] == 6
    read = sum(source.destination.nbytes for source in sources if re.search(r"\bexperts\b", source.name))
    assert read == sum(array.nbytes for array in experts.values())


def test_a_launcher_takes_the_file_and_generates_the_same_text(folder, loads, tmp_path):
    settings = {"model.path": folder, "sampling.max_new_tokens": 8}
    ids = []
    for name, mesh in (("one", {}), ("placed", {"mesh.expert": 8, "mesh.placement": loads, "mesh.replicas": 16})):
        (tmp_path / name).mkdir()
        launcher_module.run_main("infer", settings | mesh, tmp_path / name, "--prompt=the fox")
        ids.append(json.loads((tmp_path / name / "completions.jsonl").read_text())["ids"])
    assert ids[0] == ids[1]


def test_loads_are_counted_by_the_routers_experts(folder, loads):
    """As on one device, whatever the number of an expert's copies."""

    def load_of(model):
        [scored] = score_documents(
            model.params, list(TOKENS_BT), [MODEL_OWN], model._execution(0), context=16, batch_size=8
        )
        return scored.load_LE

    model = moe_jax.load(folder, mesh=placed(loads))
    np.testing.assert_array_equal(load_of(model), load_of(moe_jax.load(folder)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"placement": "nowhere.csv"},
            "mesh.placement = 'nowhere.csv': expected an expert_load.csv of launch/evaluate.py",
        ),
        ({"replicas": 6}, "mesh.replicas = 6: expected 0, or with mesh.placement a multiple of the 4 parts"),
        ({"placement": ""}, "mesh.replicas = 8: expected 0, or with mesh.placement"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(folder, loads, change, expected):
    with pytest.raises(ValueError, match=expected):
        moe_jax.load(folder, mesh=placed(loads, **change))


def test_loads_of_another_model_are_refused(folder, loads, tmp_path):
    path = tmp_path / "expert_load.csv"
    path.write_text(csv_text(["policy", "moe_layer", *range(8)], [["model", layer, *range(8)] for layer in range(3)]))
    with pytest.raises(ValueError, match="has 3 layers of 8 experts: expected the model's 2 layers of 16"):
        moe_jax.load(folder, mesh=placed(str(path)))


def test_placed_weights_are_not_saved_and_not_trained(folder, loads, tmp_path):
    model = moe_jax.load(folder, mesh=placed(loads))
    with pytest.raises(ValueError, match=r"the experts are placed by mesh\.placement"):
        model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="expected none in training"):
        placed(loads).require_trainable()
