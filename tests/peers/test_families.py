"""Every family against transformers: logits, fewer and more experts, gradients, both writers.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import json
import re

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.finetuning import ObjectiveConfig
from moe_jax.engine.request import execution_of
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import parse
from moe_jax.text.batches import Batch
from moe_jax.training.objective import objective
from tests.family_variants import VARIANTS, write
from tests.peers import peer

pytestmark = pytest.mark.peers
TOLERANCE = 1e-5  # float32 on both sides
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformers():
    """The peer, imported late, so that collecting this file needs neither it nor torch."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request, tmp_path_factory):
    """A random checkpoint that we wrote."""
    variant = VARIANTS[request.param]
    return write(tmp_path_factory.mktemp("tiny") / "model", variant), variant


def load_peer(transformers, path, **options):
    """The peer has no class for kimi_k2, so that of deepseek_v3 is used."""
    fields = json.loads((path / "config.json").read_text())
    if fields["model_type"] == "kimi_k2":
        (path / "config.json").write_text(json.dumps(fields | {"model_type": "deepseek_v3"}))
    try:
        return peer.load_model(transformers, path, **options)
    finally:
        (path / "config.json").write_text(json.dumps(fields))


def assert_same_logits(ours, model, architecture, k=None):
    """Compares rows of several lengths, padded at the end, at every position where both must agree."""
    random = np.random.default_rng(1)
    length = 48
    tokens_BT = random.integers(0, architecture.decoder.vocab_size, (8, length), dtype=np.int32)
    valid_BT = np.arange(length) < np.array([48, 7, 1, 40] * 2)[:, None]
    tokens_BT[~valid_BT] = 0
    expected_BTV, clear_BT = peer.logits(model, tokens_BT, valid_BT, architecture.moe, k)
    policy = None if k is None else moe_jax.policies.parse(f"topk:{k}")
    got_BTV = np.asarray(ours.logits(tokens_BT, policy=policy, k_max=k or 0))
    assert got_BTV.dtype == np.float32 and got_BTV.shape == expected_BTV.shape
    compared_BT = clear_BT & valid_BT
    assert compared_BT.sum() > valid_BT.sum() / 3
    got, expected = got_BTV[compared_BT], expected_BTV[compared_BT]
    assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_logits_of_what_we_write(transformers, tiny):
    path, variant = tiny
    assert_same_logits(moe_jax.load(path, dtype="float32"), load_peer(transformers, path), variant.architecture)


@pytest.mark.parametrize("more", [-1, 2])
def test_logits_with_another_number_of_experts(transformers, tiny, more):
    path, (_, architecture) = tiny
    k = architecture.moe.k + more
    ours, model = moe_jax.load(path, dtype="float32"), load_peer(transformers, path, num_experts_per_tok=k)
    assert_same_logits(ours, model, architecture, k)
    with pytest.raises(AssertionError):
        assert_same_logits(ours, model, architecture)


def test_logits_of_what_transformers_writes(transformers, tiny, tmp_path):
    path, (model_type, architecture) = tiny
    model = load_peer(transformers, path)
    model.save_pretrained(tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields | {"model_type": model_type}))
    assert checkpoint.open(tmp_path / "model").architecture == architecture
    ours = moe_jax.load(tmp_path / "model", dtype="float32")
    assert_same_logits(ours, model, architecture)
    ours.save(tmp_path / "again")
    assert checkpoint.open(tmp_path / "again").architecture == architecture


def gradients_of_the_peer(model, tokens_BT):
    """The peer's gradients by the names of a checkpoint: it keeps a layer's experts in one tensor, gates before ups."""
    import torch

    ids = torch.tensor(tokens_BT.astype(np.int64))
    logits_BTV = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    fused = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}

    def gradient(name):
        name = name.replace("block_sparse_moe", "mlp")
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            return fused[name]
        experts, number, part = found[1], int(found[2]), found[3]
        if part in ("down_proj", "w2"):
            return fused[f"{experts}.down_proj"][number]
        gate, up = np.split(fused[f"{experts}.gate_up_proj"][number], 2)
        return gate if part in ("gate_proj", "w1") else up

    return gradient


@pytest.mark.parametrize("fewer", [0, 1])
def test_gradients(transformers, tiny, fewer):
    """Gradients of the loss of fine-tuning, with the model's own k and with one fewer."""
    path, (model_type, architecture) = tiny
    k = architecture.moe.k - fewer
    model = load_peer(transformers, path, num_experts_per_tok=k)
    tokens_BT = peer.clear_tokens(model, architecture, (3, 10), k)
    expected_of = gradients_of_the_peer(model, tokens_BT)
    execution = execution_of(architecture, k)
    live = policies.settings([parse(f"topk:{k}")] * 3, architecture, k)
    given_BT = tokens_BT[:, :-1]  # the last token has no label
    positions_BT = np.broadcast_to(np.arange(given_BT.shape[1], dtype=np.int32), given_BT.shape)
    batch = Batch(given_BT, tokens_BT[:, 1:], np.ones_like(given_BT), positions_BT)._asdict()

    @jax.jit
    @jax.grad
    def gradient(params):
        return objective(params, batch, live, execution, ObjectiveConfig(), balance_loss=0.0)[0]

    got = dict(huggingface.flattened(gradient(moe_jax.load(path, dtype="float32").params)))
    for rule in FAMILIES[model_type].rules(architecture):
        ours = np.asarray(got[rule.parameter])
        if rule.parameter == "moe/router/bias_LE":
            assert not ours.any()
            continue
        expected = np.zeros_like(ours)
        for name, index in rule.placements(architecture):
            expected[index] = expected_of(name).reshape(expected[index].shape)
        if rule.parameter == "moe/router/weight_LED" and k == 1 and architecture.moe.normalize:
            # one expert has all the weight whatever the router says, so both gradients are only rounding
            assert max(np.linalg.norm(ours), np.linalg.norm(expected)) < 1e-6
            continue
        assert np.linalg.norm(expected) > 0, rule.parameter
        assert np.linalg.norm(ours - expected) <= GRADIENT_TOLERANCE * np.linalg.norm(expected), rule.parameter


@pytest.mark.parametrize("layout", ["stacked", "without its head"])
def test_other_layouts_that_the_peer_writes(transformers, tiny, tmp_path, layout):
    """All experts of a layer in one tensor; and names without `model.`, where a tied head may be missing."""
    path, variant = tiny
    if variant.model_type == "kimi_k2" or (layout != "stacked" and not variant.architecture.decoder.tie_embeddings):
        pytest.skip("nothing that the peer could write")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    if layout == "stacked":
        model.save_pretrained(tmp_path / "written", save_original_format=False)
    else:
        model.model.save_pretrained(tmp_path / "written")
    assert b"experts.0." not in (tmp_path / "written" / "model.safetensors").read_bytes() or layout != "stacked"
    opened = checkpoint.open(tmp_path / "written")
    architecture, read = opened.architecture, opened.read()
    expected = dict(huggingface.flattened(checkpoint.open(path).read()))
    read = dict(huggingface.flattened(read))
    assert architecture == variant.architecture and read.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(read[name], x, err_msg=name)
