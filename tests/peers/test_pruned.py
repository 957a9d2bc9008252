"""Pruned models in transformers: the same logits, in the family's own layout.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import json

import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.study import pruning, surgery
from moe_jax.study.pruning import PruningChoice
from tests.family_variants import VARIANTS, write
from tests.peers import peer

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("name", "keep"), [("olmoe", 11), ("qwen3_moe", 7), ("deepseek_v3", 8), ("glm4_moe", 12), ("mixtral", 3)]
)
def test_a_pruned_model_has_the_same_logits_in_transformers(name, keep, tmp_path):
    import transformers

    transformers.logging.set_verbosity_error()
    whole = checkpoint.open(write(tmp_path / "whole", VARIANTS[name]))
    kept = pruning.kept(PruningChoice("random", keep), whole.architecture, None, 0)
    smaller = surgery.architecture_of(whole.architecture, kept)
    params = surgery.without_others(whole.read(), whole.architecture, kept)
    whole.for_new_weights().with_architecture(smaller).save(tmp_path / "pruned", params)
    fields = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert keep in (fields.get("num_experts"), fields.get("n_routed_experts"), fields.get("num_local_experts"))
    model = peer.load_model(transformers, tmp_path / "pruned")
    tokens_BT = np.random.default_rng(1).integers(2, 64, (8, 40), dtype=np.int32)
    expected_BTV, clear_BT = peer.logits(model, tokens_BT, np.ones(tokens_BT.shape, bool), smaller.moe)
    got_BTV = np.asarray(moe_jax.load(tmp_path / "pruned", dtype="float32").logits(tokens_BT))
    assert clear_BT.mean() > 1 / 3
    got, expected = got_BTV[clear_BT], expected_BTV[clear_BT]
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    whole_BTV = np.asarray(moe_jax.load(tmp_path / "whole", dtype="float32").logits(tokens_BT))
    assert np.linalg.norm(whole_BTV[clear_BT] - expected) > 0.01 * np.linalg.norm(expected)
