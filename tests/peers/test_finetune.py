"""What launch/finetune.py exports, run by transformers as it is: with fewer experts, by the checkpoint alone.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import command
from moe_jax.config.gin import read_config
from tests import family_variants, launcher_module, tiny_model, tiny_training
from tests.peers import peer, test_transformers

pytestmark = pytest.mark.peers
transformers = test_transformers.transformers
TOLERANCE = 1e-5  # of a loss in float32 on both sides
FEW = {"training.steps": 8, "training.evaluate_every": 4, "policy.spec": "topk:3", "finetune.train": "lora"}


@pytest.fixture(scope="module", params=["olmoe", "qwen2_moe_dense", "deepseek_v3", "glm4_moe"])
def tuned(request, tmp_path_factory):
    """The architecture of a small model of the family, and the folder of its run."""
    variant = family_variants.VARIANTS[request.param]
    decoder = dataclasses.replace(variant.architecture.decoder, vocab_size=512)
    variant = variant._replace(architecture=dataclasses.replace(variant.architecture, decoder=decoder))
    folder = tmp_path_factory.mktemp("finetuned")
    params = family_variants.random_params(variant)
    tiny_model.write_model(folder / "model", variant.architecture, params, model_type=variant.model_type)
    sources = tiny_training.write_sources(folder / "sources")
    overrides = tiny_training.finetuning_overrides(sources, folder / "model", **FEW)
    (folder / "out").mkdir()
    run = command.Command("finetune", read_config(None, overrides), folder / "out", False, io.StringIO())
    launcher_module.import_launcher("finetune").main(run)
    return variant.architecture, folder


def test_its_loss_equals_that_of_the_exported_model(transformers, tuned):
    """Over tokens whose experts were clearly chosen; with another number of experts the loss differs."""
    architecture, folder = tuned
    assert json.loads((folder / "out" / "model" / "config.json").read_text())["num_experts_per_tok"] == 3
    ours, model = moe_jax.load(folder / "out" / "model"), peer.load_model(transformers, folder / "out" / "model")
    text = (folder / "sources" / "train" / "cmd.py").read_text()
    tokens_BT = np.array(ours.tokenizer.encode(text).ids[: 16 * 33], np.int32).reshape(16, 33)
    given_BT, labels_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    expected_BTV, clear_BT = peer.logits(model, given_BT, np.ones(given_BT.shape, bool), architecture.moe, 3)
    assert clear_BT.mean() > 0.5

    def loss(logits_BTV):
        share_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
        return -np.take_along_axis(share_BTV, labels_BT[..., None], axis=2)[..., 0][clear_BT].mean()

    assert loss(ours.logits(given_BT)) == pytest.approx(loss(expected_BTV), rel=TOLERANCE)
    assert loss(ours.logits(given_BT, policy="topk:4", k_max=4)) != pytest.approx(loss(expected_BTV), rel=1e-4)
    before = moe_jax.load(folder / "model").logits(given_BT, policy="topk:3")
    assert loss(expected_BTV) < loss(before) - 0.01, "nothing was learnt"
