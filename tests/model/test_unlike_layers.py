"""Models whose layers differ, such as pruned ones, against a plain loop over the tensors of their checkpoint."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint import huggingface
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture, MoEConfig
from moe_jax.conversion import convert
from moe_jax.engine import cache as caches
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.model import decoder, parameters
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.study import calibrate
from tests.family_variants import GROUPED, TRUNK, Variant, write
from tests.model import plain_loop

TOLERANCE = 1e-5
K_L, EXPERTS_L = (4, 4, 3, 2, 2), (12, 12, 3, 12, 3)
ARCHITECTURE = Architecture(
    dataclasses.replace(TRUNK, num_layers=6, num_dense_layers=1, dense_layers=(1,), d_model=24, dense_hidden=20),
    dataclasses.replace(GROUPED, qk_norm=True),
    MoEConfig(
        num_experts=12,
        k=4,
        expert_hidden=10,
        num_shared_experts=0,
        score="softmax",
        selection_bias=False,
        num_experts_of_layers=EXPERTS_L,
        k_of_layers=K_L,
    ),
)
VARIANT = Variant("qwen3_moe", ARCHITECTURE)
ROWS, LENGTH = 3, 13
TOKENS_BT = np.random.default_rng(2).integers(2, TRUNK.vocab_size, (ROWS, LENGTH), dtype=np.int32)
POSITIONS_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS_BT.shape)
MISSING_LE = np.arange(12) >= np.array(EXPERTS_L)[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("unlike") / "model", VARIANT, dtype="float32")


@pytest.fixture(scope="module")
def model(folder):
    return moe_jax.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def tensors(folder):
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    return {name: jnp.asarray(one) for name, one in found.items()}


def plain(tensors, k_L, architecture=ARCHITECTURE):
    with jax.numpy_rank_promotion("allow"):
        return jax.vmap(lambda tokens_T: plain_loop.logits(tensors, tokens_T, architecture, k_L))(TOKENS_BT)


def assert_close(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)


def settings_of(policy, execution):
    return policies.settings([policy] * ROWS, ARCHITECTURE, execution.k_max)


def test_layers_of_equal_shape_share_a_stack(model):
    assert layer_order.stacks(ARCHITECTURE) == {"dense": (1,), "moe": [0, 2, 4], "moe_3": [3, 5]}
    shapes = {stack: model.params[stack]["router"]["weight_LED"].shape for stack in ("moe", "moe_3")}
    assert shapes == {"moe": (3, 12, 24), "moe_3": (2, 3, 24)}
    passes = [(len(block.layers), block.times) for block in layer_order.blocks(ARCHITECTURE)]
    assert passes == [(1, 1), (1, 1), (2, 2)]


def test_logits(model, tensors):
    assert_close(model.logits(TOKENS_BT), plain(tensors, K_L))


def test_a_pattern_with_several_layers_of_one_stack(tmp_path):
    """Read within the stacks, and taken out of them as in training."""
    trunk = dataclasses.replace(ARCHITECTURE.decoder, num_dense_layers=2, dense_layers=(2, 5))
    moe = dataclasses.replace(ARCHITECTURE.moe, num_experts=6, k=2, num_experts_of_layers=(), k_of_layers=())
    architecture = Architecture(trunk, ARCHITECTURE.attention, moe)
    assert [(len(block.layers), block.times) for block in layer_order.blocks(architecture)] == [(3, 2)]
    folder = write(tmp_path / "model", Variant("qwen3_moe", architecture), dtype="float32")
    model, tensors = moe_jax.load(folder, dtype="float32"), safetensors.numpy.load_file(folder / "model.safetensors")
    expected_BTV = plain({name: jnp.asarray(one) for name, one in tensors.items()}, (2,) * 4, architecture)
    assert_close(model.logits(TOKENS_BT), expected_BTV)
    execution = execution_of(architecture)
    live = policies.settings([MODEL_OWN] * ROWS, architecture, execution.k_max)
    rows = TOKENS_BT, POSITIONS_BT, np.ones_like(TOKENS_BT)
    x_BTD, _ = jax.jit(lambda params: decoder.hidden(params, *rows, live, execution))(model.params)
    assert_close(decoder.logits(model.params, x_BTD), expected_BTV)


@pytest.mark.parametrize("k", [1, 5])
def test_a_layer_with_fewer_experts_than_a_policy_asks_for_keeps_all_of_them(model, tensors, k):
    expected = plain(tensors, tuple(min(k, experts) for experts in EXPERTS_L))
    assert_close(model.logits(TOKENS_BT, policy=f"topk:{k}", k_max=5), expected)


def test_prompts_in_chunks_and_decode(model, tensors):
    expected_BTV, execution = plain(tensors, K_L), execution_of(ARCHITECTURE)
    live = settings_of(MODEL_OWN, execution)

    @jax.jit
    def extend(params, cache, tokens_BT, start_B):
        x_BTD, cache, use = decoder.extend(
            params, cache, tokens_BT, start_B, jnp.ones(tokens_BT.shape, bool), live, execution
        )
        return decoder.logits(params, x_BTD), cache, use

    cache, at = caches.allocate(ARCHITECTURE, ROWS, LENGTH, jnp.float32), 0
    for count in (5, 5, 1, 1, 1):
        got, cache, use = extend(model.params, cache, TOKENS_BT[:, at : at + count], np.full(ROWS, at, np.int32))
        assert_close(got, expected_BTV[:, at : at + count])
        at += count
        np.testing.assert_array_equal(use.load_E.sum(axis=1), np.array(K_L) * ROWS * count)
        assert not np.asarray(use.load_E)[MISSING_LE].any()
        kept_L = (np.asarray(use.chosen_NK) >= 0).sum(axis=(1, 2))
        np.testing.assert_array_equal(kept_L, np.array(K_L) * ROWS * count)


def test_gradients(model, tensors):
    execution, random = execution_of(ARCHITECTURE), np.random.default_rng(3)
    weight_BTV = random.standard_normal((ROWS, LENGTH, TRUNK.vocab_size)).astype(np.float32)
    live = settings_of(MODEL_OWN, execution)

    def ours(params):
        rows = TOKENS_BT, POSITIONS_BT, np.ones_like(TOKENS_BT)
        x_BTD, _ = decoder.hidden(params, *rows, live, execution)
        return (decoder.logits(params, x_BTD) * weight_BTV).sum()

    got = dict(huggingface.flattened(jax.jit(jax.grad(ours))(model.params)))
    expected = jax.jit(jax.grad(lambda tensors: (plain(tensors, K_L) * weight_BTV).sum()))(tensors)
    seen = set()
    for rule in FAMILIES["qwen3_moe"].rules(ARCHITECTURE):
        for name, index in rule.placements(ARCHITECTURE):
            one = np.asarray(expected[name])
            ours_of_it = np.asarray(got[rule.parameter])[index].reshape(one.shape)
            assert np.linalg.norm(ours_of_it - one) <= 1e-4 * np.linalg.norm(one) + 1e-6, name
            seen.add(name)
    assert seen == set(tensors)


def test_no_policy_chooses_an_expert_that_a_layer_lacks(model):
    execution = execution_of(ARCHITECTURE, 8)
    rows_JT = np.random.default_rng(4).integers(2, TRUNK.vocab_size, (calibrate.ROWS, 16), dtype=np.int32)
    calibration = calibrate.measure(model.params, rows_JT, execution_of(ARCHITECTURE))
    assert not calibration.similarity_LEE[MISSING_LE].any()
    own = [calibration.similarity_LEE[layer, :experts, :experts] for layer, experts in enumerate(EXPERTS_L)]
    assert all(np.allclose(np.diag(similarity_EE), 1, atol=1e-5) for similarity_EE in own)
    step_wise = "opportunistic:1", "budget:5", "reroute:1,-1", "capacity:0.5", "capacity:0.5,overflow=next"
    specs = [*(f"topk:8+{spec}" for spec in step_wise), "median", "mass:0.5", "schedule:8,2,8,1"]
    rows = np.repeat(np.arange(len(specs)), ROWS)
    live = policies.settings([parse(specs[row], calibration) for row in rows], ARCHITECTURE, execution.k_max)
    sequences = (np.tile(every_BT, (len(specs), 1)) for every_BT in (TOKENS_BT, POSITIONS_BT, np.ones_like(TOKENS_BT)))
    hidden = jax.jit(functools.partial(decoder.hidden, execution=execution, side_by_side=True, in_stacks=True))
    _, use = hidden(model.params, *sequences, live)
    chosen_LBTK = np.asarray(use.chosen_NK).reshape(len(EXPERTS_L), len(rows), LENGTH, -1)
    assert (chosen_LBTK < np.array(EXPERTS_L)[:, None, None, None]).all()
    assert not np.asarray(use.load_E)[MISSING_LE].any()
    for number, spec in enumerate(specs):
        own_LBTK = chosen_LBTK[:, rows == number]
        assert (own_LBTK >= 0).any(axis=(1, 2, 3)).all(), spec
        ordered = np.sort(np.where(own_LBTK < 0, -1 - np.arange(own_LBTK.shape[-1]), own_LBTK))
        assert (np.diff(ordered) > 0).all(), f"{spec} chose an expert twice"


def test_measurements_leave_out_missing_experts(model):
    [scored] = score_documents(
        model.params, list(TOKENS_BT), [MODEL_OWN], execution_of(ARCHITECTURE), context=LENGTH, batch_size=ROWS
    )
    np.testing.assert_array_equal(np.ma.getmaskarray(scored.load_LE), MISSING_LE)
    np.testing.assert_array_equal(scored.load_LE.sum(axis=1), np.array(K_L) * ROWS * (LENGTH - 1))
    np.testing.assert_allclose(scored.load_LE.mean(axis=1), scored.load_LE.sum(axis=1) / np.array(EXPERTS_L))


def test_counts(tensors):
    assert parameters.count(ARCHITECTURE) == sum(one.size for one in tensors.values())
    unused = sum(EXPERTS_L) - sum(K_L)
    one_expert = 3 * ARCHITECTURE.decoder.d_model * ARCHITECTURE.moe.expert_hidden
    assert parameters.count_expert(ARCHITECTURE) == one_expert
    assert parameters.count_active(ARCHITECTURE) == parameters.count(ARCHITECTURE) - unused * one_expert


def test_round_trip(model, tensors, tmp_path):
    model.save(tmp_path / "again", dtype="float32")
    again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (fields["num_experts"], fields["num_experts_of_layers"]) == (12, list(EXPERTS_L))
    assert (fields["num_experts_per_tok"], fields["num_experts_per_tok_of_layers"]) == (4, list(K_L))
    assert fields["mlp_only_layers"] == [1]
    assert checkpoint.open(tmp_path / "again").architecture == ARCHITECTURE
    exported = policies.with_own(parse("topk:4"), ARCHITECTURE)
    assert exported.moe.k_of_layers == (4, 4, 3, 4, 3)


@pytest.mark.parametrize("layout", ["stacked", "orbax"])
def test_other_layouts_hold_every_stack(folder, model, tmp_path, layout):
    convert(folder, tmp_path / layout, layout=layout)
    convert(tmp_path / layout, tmp_path / "back")
    back = huggingface.nested(dict(huggingface.flattened(checkpoint.open(tmp_path / "back").read())))
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, model.params))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_of_layers": [12, 3]}, "moe.num_experts_of_layers"),
        ({"num_experts_of_layers": [12, 12, 3, 12, "3"]}, "num_experts_of_layers = .*: expected a list of integers"),
        ({"num_experts_per_tok_of_layers": [4, 4, 3, 2, 4]}, "k of MoE layer 4 = 4: expected at most its 3 experts"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, changes, words):
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=f"config.json: {words}"):
        checkpoint.open(tmp_path)
