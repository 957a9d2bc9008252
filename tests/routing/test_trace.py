"""A recorded trace in a model with the same number of experts, with more, and in the policy that replays it."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing import trace as traces
from moe_jax.routing.policies import Context, Replayed, select, settings
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.selection import Routing
from tests import tiny_model

SHIPPED = pathlib.Path(__file__).parents[2] / "assets" / "traces" / "demo.npz"


def random_trace(layers=3, documents=4, tokens=10, k=4, experts=16, seed=0):
    random = np.random.default_rng(seed)
    chosen = random.permuted(np.broadcast_to(np.arange(experts), (layers, documents, tokens, experts)), axis=3)
    return traces.Trace(chosen[..., :k].astype(np.uint8), experts)


def test_the_same_number_of_experts_replays_the_recording():
    trace = random_trace()
    expert_LBTK = trace.replay(num_layers=4, num_experts=16, k_max=4, rows=4, length=10)
    np.testing.assert_array_equal(expert_LBTK[:3], trace.expert_LJTK)  # a document for each row
    np.testing.assert_array_equal(expert_LBTK[3], trace.expert_LJTK[0])  # layers repeat


def test_fewer_slots_are_the_best():
    trace = random_trace()
    few, all_ = (trace.replay(3, 16, k, 2, 15) for k in (2, 4))
    np.testing.assert_array_equal(few, all_[..., :2])


def test_a_row_continues_in_the_next_document_and_rows_never_meet():
    trace = random_trace()
    expert_LBTK = trace.replay(3, 16, 4, rows=8, length=60)
    stream = trace.expert_LJTK.reshape(3, 40, 4)
    for row in range(8):
        np.testing.assert_array_equal(expert_LBTK[:, row], stream[:, (5 * row + np.arange(60)) % 40])


def test_more_experts_take_a_layer_for_each_range():
    trace = random_trace()
    expert_LBTK = trace.replay(num_layers=2, num_experts=32, k_max=5, rows=4, length=10)
    recorded = trace.expert_LJTK.astype(int)
    np.testing.assert_array_equal(expert_LBTK[0, ..., [0, 2, 4]], np.moveaxis(recorded[0, ..., :3], -1, 0))
    np.testing.assert_array_equal(expert_LBTK[0, ..., [1, 3]], np.moveaxis(recorded[1, ..., :2], -1, 0) + 16)
    np.testing.assert_array_equal(expert_LBTK[1, ..., 0], recorded[2, ..., 0])
    assert all(len(set(slots)) == 5 for slots in expert_LBTK.reshape(-1, 5).tolist())


@pytest.mark.parametrize(
    ("experts", "k", "message"),
    [
        (24, 4, "moe.num_experts = 24: expected a multiple of the 16 experts of a recorded trace, at most 48; or"),
        (8, 4, "moe.num_experts = 8: expected a multiple"),
        (64, 4, "at most 48"),
        (16, 5, "5 slots per token: expected at most the 4 of the recorded trace"),
        (32, 9, "9 slots per token: expected at most the 8"),
    ],
)
def test_impossible_replays_are_refused(experts, k, message):
    with pytest.raises(ValueError, match=message):
        random_trace().replay(3, experts, k, 1, 1)


def test_round_trip(tmp_path):
    trace = random_trace()
    traces.save(tmp_path / "a.npz", trace)
    loaded = traces.read(tmp_path / "a.npz")
    assert loaded.num_experts == 16
    np.testing.assert_array_equal(loaded.expert_LJTK, trace.expert_LJTK)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.write_bytes(b"no archive"),
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: np.savez(path, expert_LJTK=np.zeros((2, 3), np.uint8), num_experts=4),
        lambda path: np.savez(path, expert_LJTK=np.full((1, 1, 1, 1), 4, np.uint8), num_experts=4),
    ],
)
def test_other_files_are_refused(tmp_path, write):
    write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"benchmark.trace = '.*a.npz': .*expected") as caught:
        traces.read(tmp_path / "a.npz")
    assert len(str(caught.value).splitlines()) == 1


def test_the_shipped_trace_is_small_and_whole():
    trace = traces.read(SHIPPED)
    assert SHIPPED.stat().st_size < 300_000
    assert (trace.num_experts, trace.expert_LJTK.shape) == (64, (5, 64, 128, 8))
    ascending = np.sort(trace.expert_LJTK, axis=3)
    assert (np.diff(ascending.astype(int), axis=3) > 0).all()  # no token takes an expert twice
    load_LE = np.stack([np.bincount(one.ravel(), minlength=64) for one in trace.expert_LJTK])
    assert (load_LE > 0).all() and (load_LE.max(axis=1) / load_LE.mean(axis=1)).min() > 1.1


MOE = MoEConfig(num_experts=6, k=3, expert_hidden=4)
MIX_NE = np.linspace(0.1, 0.9, 24).reshape(4, 6).astype(np.float32)


def select_replayed(replay_LNK, moe=MOE):
    routing = Routing(jnp.asarray(MIX_NE), jnp.asarray(MIX_NE))
    live = settings([parse("model"), parse("layers:3,2")], tiny_model.layers_of(moe, 2), 3)
    context = Context(jnp.int32(1), jnp.array([0, 0, 1, 1]), jnp.array([True, True, True, False]), 2)
    return select(routing, live if replay_LNK is None else Replayed(live, replay_LNK), context, moe, 3)


def test_the_policy_takes_the_given_experts_at_the_routers_weights():
    given_NK = np.array([[0, 1, 2], [4, 0, 3], [2, 5, 1], [0, 1, 2]])
    selection = select_replayed(jnp.asarray(np.stack([np.zeros_like(given_NK), given_NK])))
    np.testing.assert_array_equal(selection.expert_NK, given_NK)
    keep_NK = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)  # the last is padding
    np.testing.assert_array_equal(selection.keep_NK, keep_NK)
    mix_NK = np.where(keep_NK, np.take_along_axis(MIX_NE, given_NK, axis=1), 0)
    expected_NK = mix_NK / np.maximum(mix_NK.sum(axis=1, keepdims=True), 1e-20)
    np.testing.assert_allclose(selection.weight_NK, expected_NK, rtol=1e-6)


def test_a_token_without_a_recording_is_routed_normally():
    normal, unrecorded = select_replayed(None), select_replayed(jnp.full((2, 4, 3), -1))
    for one, other in zip(normal, unrecorded):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(normal.expert_NK, np.tile([5, 4, 3], (4, 1)))


@pytest.mark.parametrize("kept", [True, False])
def test_a_part_of_the_tokens_replays_its_part(kept):
    """As when prompts are read in chunks: arrays of tokens are cut, settings of requests are not."""
    live = settings([parse("model"), parse("layers:3,2")], tiny_model.layers_of(MOE, 2), 3)
    random = np.random.default_rng(0)
    given_LNK = random.integers(-1, 6, (2, 4, 3)).astype(np.int32)
    keep_LNK = random.integers(0, 2, (2, 4, 3)).astype(bool) if kept else None
    replayed = Replayed(live, given_LNK, keep_LNK)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def selected(settings, first, last):
        tokens = slice(first, last)
        routing = Routing(jnp.asarray(MIX_NE[tokens]), jnp.asarray(MIX_NE[tokens]))
        context = Context(jnp.int32(1), jnp.array([0, 0, 1, 1])[tokens], jnp.ones(4, bool)[tokens], 0)
        return select(routing, settings, context, MOE, 3)

    def slice_chunk(x_LNK):
        return x_LNK[:, 1:3]

    for part, whole in zip(selected(replayed.slice_tokens(slice_chunk), 1, 3), selected(replayed, 0, 4), strict=True):
        np.testing.assert_array_equal(part, whole[1:3])
    assert live.slice_tokens(slice_chunk) is live
