"""What `convert` writes, run by transformers: fewer experts by the checkpoint alone.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import pytest

import moe_jax
from moe_jax import conversion
from moe_jax.checkpoint import huggingface
from tests.peers import peer, test_transformers
from tests.peers.test_transformers import BASE, assert_same_logits

pytestmark = pytest.mark.peers
transformers = test_transformers.transformers


@pytest.mark.parametrize("k", [1, 4])
def test_logits_of_fewer_experts(transformers, tmp_path, k):
    params = test_transformers.random_params(BASE)
    huggingface.write_checkpoint(tmp_path / "given", BASE, params, dtype="float32")
    conversion.convert(tmp_path / "given", tmp_path / "few", policy=f"topk:{k}", shard_bytes=100_000)
    assert len(list((tmp_path / "few").glob("model-*.safetensors"))) > 2
    model = peer.load_model(transformers, tmp_path / "few")
    assert_same_logits(moe_jax.load(tmp_path / "given"), model, BASE.decoder.vocab_size, policy=f"topk:{k}")
    assert_same_logits(moe_jax.load(tmp_path / "few"), model, BASE.decoder.vocab_size)
    with pytest.raises(AssertionError):
        assert_same_logits(moe_jax.load(tmp_path / "given"), model, BASE.decoder.vocab_size)
