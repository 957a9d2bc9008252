"""Logits against transformers, on checkpoints that each side writes: the same files, the same tokens, two programs.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import dataclasses
import pathlib

import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.text.held_out import load_held_out
from moe_jax.text.tokenizer import encode_documents
from tests.peers import peer

pytestmark = pytest.mark.peers
DEMO = pathlib.Path(__file__).parents[2] / "assets" / "demo"
TOLERANCE = 1e-5  # float32 on both sides

BASE = Architecture(
    DecoderConfig(
        vocab_size=96,
        d_model=64,
        num_layers=4,
        num_dense_layers=1,
        dense_hidden=80,
        tie_embeddings=False,
        max_context=64,
    ),
    AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=24, qk_norm=False, bias=True),
    MoEConfig(num_experts=32, k=8, expert_hidden=24, num_shared_experts=1),
)


def variant(decoder=None, attention=None, moe=None):
    """`BASE` with some settings changed."""
    return Architecture(
        dataclasses.replace(BASE.decoder, **(decoder or {})),
        dataclasses.replace(BASE.attention, **(attention or {})),
        dataclasses.replace(BASE.moe, **(moe or {})),
    )


VARIANTS = {
    "base": BASE,
    "qk_norm": variant(attention={"qk_norm": True, "bias": False}),
    "qk_norm_and_bias": variant(attention={"qk_norm": True, "rope_theta": 1e6}, decoder={"norm_eps": 1e-3}),
    "groups": variant(moe={"num_groups": 4, "num_groups_kept": 2, "routed_scaling": 2.5, "num_shared_experts": 2}),
    "dense_layers": variant(decoder={"num_dense_layers": 3}),
    "no_dense_layers": variant(decoder={"num_dense_layers": 0, "tie_embeddings": True}),
    "not_normalized": variant(moe={"normalize": False}, attention={"rope_fraction": 1.0, "num_kv_heads": 4}),
}


@pytest.fixture(scope="module")
def transformers():
    """The peer, imported late, so that collecting this file needs neither it nor torch."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def random_params(architecture):
    """Parameters that keep activations near one, with a selection bias that matters."""
    random = np.random.default_rng(0)
    flat = {}
    for rule in FAMILIES["glm4_moe"].rules(architecture):
        x = random.standard_normal(rule.shape(architecture)).astype(np.float32)
        if "norm" in rule.parameter:
            x = 1 + x / 10
        elif "bias" in rule.parameter:
            x = x / 10
        elif rule.parameter != "embedding_VD":
            x = x * rule.stored_shape(architecture)[-1] ** -0.5
        flat[rule.parameter] = x
    return huggingface.nested(flat)


def assert_same_logits(ours, model, vocab_size, policy=None):
    """Compares rows of several lengths, padded at the end, at every position where both must agree."""
    random = np.random.default_rng(1)
    tokens_BT = random.integers(0, vocab_size, (16, 12), dtype=np.int32)
    valid_BT = np.arange(12) < np.array([12, 7, 1, 10] * 4)[:, None]
    tokens_BT[~valid_BT] = 0
    k = model.config.num_experts_per_tok
    expected_BTV, clear_BT = peer.logits(model, tokens_BT, valid_BT, ours.architecture.moe, k)
    got_BTV = np.asarray(ours.logits(tokens_BT, policy=policy))
    assert got_BTV.dtype == np.float32 and got_BTV.shape == expected_BTV.shape
    compared_BT = clear_BT & valid_BT
    assert compared_BT.sum() > valid_BT.sum() / 2
    got, expected = got_BTV[compared_BT], expected_BTV[compared_BT]
    assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request, tmp_path_factory):
    """A random checkpoint that we wrote, and its architecture."""
    architecture = VARIANTS[request.param]
    path = tmp_path_factory.mktemp("tiny") / "model"
    huggingface.write_checkpoint(path, architecture, random_params(architecture), token_ids={"eos_token_id": 1})
    return path, architecture


def test_logits_of_what_we_write(transformers, tiny):
    path, architecture = tiny
    ours = moe_jax.load(path, dtype="float32")
    assert_same_logits(ours, peer.load_model(transformers, path), architecture.decoder.vocab_size)


def test_logits_with_fewer_experts(transformers, tiny):
    path, architecture = tiny
    ours, model = moe_jax.load(path, dtype="float32"), peer.load_model(transformers, path, num_experts_per_tok=4)
    vocab_size = architecture.decoder.vocab_size
    assert_same_logits(ours, model, vocab_size, policy=moe_jax.policies.parse("topk:4"))
    with pytest.raises(AssertionError):
        assert_same_logits(ours, model, vocab_size)


def test_logits_of_what_transformers_writes(transformers, tmp_path):
    config = transformers.Glm4MoeConfig(
        **FAMILIES["glm4_moe"].config_json(VARIANTS["groups"]) | {"initializer_range": 0.2}
    )
    transformers.set_seed(0)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    assert checkpoint.open(tmp_path / "model").architecture == VARIANTS["groups"]
    ours = moe_jax.load(tmp_path / "model", dtype="float32")
    assert_same_logits(ours, peer.load_model(transformers, tmp_path / "model"), VARIANTS["groups"].decoder.vocab_size)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_shared_experts(transformers, tmp_path):
    """The peer then makes shared experts of width zero, which no file has."""
    architecture = variant(moe={"num_shared_experts": 0})
    huggingface.write_checkpoint(tmp_path / "model", architecture, random_params(architecture))
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    assert_same_logits(moe_jax.load(tmp_path / "model", dtype="float32"), model.eval(), architecture.decoder.vocab_size)


def test_dtypes_of_the_peer(transformers, tiny):
    """The peer keeps the selection bias in float32, as we write it, and reads the rest as bfloat16.

    From 5.24 on it makes the router float32 too, whatever is stored.
    """
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny[0], dtype="auto")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert set() < biases <= wide <= biases | {name for name in dtypes if name.endswith("mlp.gate.weight")}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("k", [8, 4])
def test_logits_of_the_demo(transformers, k):
    architecture = checkpoint.open(DEMO).architecture
    assert architecture.moe.k == 8
    ours, model = moe_jax.load(DEMO, dtype="float32"), peer.load_model(transformers, DEMO, num_experts_per_tok=k)
    policy = None if k == 8 else moe_jax.policies.parse(f"topk:{k}")
    assert_same_logits(ours, model, architecture.decoder.vocab_size, policy)


def test_token_ids_of_the_demo(transformers):
    """The peer stops at the same token."""
    ids = checkpoint.open(DEMO).token_ids
    config = transformers.AutoConfig.from_pretrained(DEMO)
    generation = transformers.GenerationConfig.from_pretrained(DEMO)
    assert "eos_token_id" in ids
    for name, value in ids.items():
        assert getattr(config, name) == value == getattr(generation, name)


@pytest.mark.parametrize("k", [8, 2])
def test_bits_per_byte_of_the_demo(transformers, k):
    """Against the peer's own loss, window by window, over held-out files of one and of several windows."""
    import torch

    ours = moe_jax.load(DEMO, dtype="float32")
    model = peer.load_model(transformers, DEMO, num_experts_per_tok=k)
    documents = sorted(load_held_out(DEMO.parent / "text"), key=lambda one: len(one.text))[:250:50]
    tokens, sizes = encode_documents(ours.tokenizer, documents), [len(one.text.encode()) for one in documents]
    context = ours.architecture.decoder.max_context
    assert min(map(len, tokens)) < context < max(map(len, tokens))
    [scored_J] = score_documents(
        ours.params,
        tokens,
        [moe_jax.policies.parse(f"topk:{k}")],
        execution_of(ours.architecture),
        **{"context": context, "batch_size": 4},
    )
    for ids, size, bits in zip(tokens, sizes, scored_J.bits_J):
        nats, scored = 0.0, 1  # the first token is given
        while scored < len(ids):
            begin = max(0, scored - 1 - context // 4)
            window = torch.tensor(ids[begin : begin + context + 1].astype(np.int64))[None]
            labels = window.clone()
            labels[0, : scored - begin] = -100  # not part of this loss
            count = int((labels != -100).sum())
            with torch.no_grad():
                nats += float(model(input_ids=window, labels=labels).loss) * count
            scored += count
        assert bits / size == pytest.approx(nats / np.log(2) / size, abs=1e-4)
