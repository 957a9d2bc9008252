"""The formulas against the arrays of real decoders, against XLA's own count, and against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.cost import roofline
from moe_jax.engine import cache as caches
from moe_jax.kernels.chooser import Kernels
from moe_jax.model import decoder, parameters
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from tests import tiny_model
from tests.family_variants import VARIANTS

UNTIED = tiny_model.changed(
    decoder={"tie_embeddings": False, "num_dense_layers": 0},
    attention={"qk_norm": False, "bias": True},
    moe={"num_shared_experts": 0, "selection_bias": False, "score": "softmax"},
)
SEVERAL_SHARED = tiny_model.changed(moe={"num_shared_experts": 3}, attention={"num_kv_heads": 4})

ARCHITECTURES = {
    "tiny": tiny_model.ARCHITECTURE,
    "untied": UNTIED,
    "several_shared": SEVERAL_SHARED,
    **{name: variant.architecture for name, variant in VARIANTS.items()},
}


def shapes_of(architecture):
    return jax.eval_shape(lambda: decoder.split(decoder.Decoder(architecture, nnx.Rngs(0))))


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_parameters_are_those_of_the_arrays(architecture):
    shapes = shapes_of(architecture)
    assert parameters.count(architecture) == count(shapes)
    assert parameters.count_expert(architecture) == count(shapes["moe"]["experts"]) // (
        architecture.decoder.num_moe_layers * architecture.moe.num_experts
    )


def test_active_parameters_leave_out_the_experts_that_are_not_chosen():
    one, all_of_them = (
        parameters.count_active(tiny_model.changed(decoder={"num_dense_layers": 0}, moe={"k": k})) for k in (1, 16)
    )
    architecture = tiny_model.changed(decoder={"num_dense_layers": 0})
    assert all_of_them == parameters.count(architecture)
    assert all_of_them - one == 3 * 15 * (3 * 64 * 24)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_step_that_uses_every_expert_reads_every_array_once_and_the_cache(architecture):
    trunk, moe = architecture.decoder, architecture.moe
    step = roofline.Step([5, 9], [1, 1], 2 * trunk.num_moe_layers * moe.k, trunk.num_moe_layers * moe.num_experts)
    weights = count(shapes_of(architecture))
    if not trunk.tie_embeddings:
        weights -= (trunk.vocab_size - 2) * trunk.d_model  # two rows of the embedding
    # 7 + 7 positions before the step and one new one per row: two rows of 8 positions
    cache = count(jax.eval_shape(lambda: caches.allocate(architecture, 2, 8, jnp.float32)))
    assert roofline.work(architecture, step, 4).bytes == 4 * (weights + cache)
    assert roofline.work(architecture, step, 2).bytes == 2 * (weights + cache)


def test_by_hand():
    """A model in which no two parts have the same size; bytes of float16, and operations."""
    architecture = Architecture(
        DecoderConfig(vocab_size=100, d_model=8, num_layers=2, num_dense_layers=1, dense_hidden=12, max_context=64),
        AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4, qk_norm=True),
        MoEConfig(num_experts=10, k=3, expert_hidden=5, num_shared_experts=2, selection_bias=True),
    )
    attention = 8 * 24 + 8 * 8 + 8 * 8 + 24 * 8  # query, key, value, output
    norms = 8 + 8 + 4 + 4
    dense, shared, expert = 3 * 8 * 12, 3 * 8 * 10, 3 * 8 * 5
    step = roofline.Step([0, 0], [3, 2], 14, 7)  # one of 15 slots dropped; 7 of the 10 experts
    weights = 2 * (attention + norms) + dense + (80 + 10) + shared + 7 * expert + 8 + 100 * 8
    cache = 2 * 2 * (3 + 2) * 8  # keys and values, layers, tokens, two heads of four
    assert roofline.work(architecture, step, 2).bytes == 2 * (weights + cache)
    seen = (1 + 2 + 3) + (1 + 2)
    products = 2 * 5 * attention + 2 * 2 * seen * 24 + 5 * dense + 5 * 80 + 5 * shared + 14 * expert + 2 * 8 * 100
    assert roofline.work(architecture, step, 2).flops == 2 * products


def test_latent_attention_by_hand():
    """A prefill expands latents to heads; a step of one token reads them as they are."""
    architecture = Architecture(
        DecoderConfig(vocab_size=100, d_model=8, num_layers=2, num_dense_layers=1, dense_hidden=12, max_context=64),
        AttentionConfig(
            kind="latent",
            num_heads=6,
            qk_norm=False,
            query_rank=7,
            latent_rank=5,
            nope_head_dim=3,
            rope_head_dim=2,
            value_head_dim=4,
        ),
        MoEConfig(num_experts=10, k=3, expert_hidden=5, shared_hidden=11, shared_gate=True),
    )
    attention = 8 * 7 + 7 * 6 * 5 + 8 * (5 + 2) + 5 * 6 * (3 + 4) + 6 * 4 * 8
    dense, shared, expert = 3 * 8 * 12, 3 * 8 * 11 + 8, 3 * 8 * 5
    weights = 2 * (attention + 8 + 8 + 7 + 5) + dense + (80 + 10) + shared + 3 * expert + 8 + 100 * 8
    for cached, new, seen, mixed in ((20, 1, 21, 6 * (5 + 2 + 5)), (0, 4, 1 + 2 + 3 + 4, 6 * (3 + 2 + 4))):
        work = roofline.work(architecture, roofline.Step([cached], [new], 3 * new, 3), 2)
        assert work.bytes == 2 * (weights + 2 * (5 + 2) * (cached + new))
        products = new * (2 * attention + dense + 80 + shared) + 2 * seen * mixed + 3 * new * expert + 8 * 100
        assert work.flops == 2 * products


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32),
        AttentionConfig(
            kind="latent",
            num_heads=8,
            qk_norm=False,
            query_rank=96,
            latent_rank=128,
            nope_head_dim=48,
            rope_head_dim=16,
            value_head_dim=80,
        ),
    ],
    ids=["grouped", "latent"],
)
@pytest.mark.parametrize(("start", "length"), [(31, 1), (0, 16)])
def test_operations_are_those_that_xla_counts(start, length, attention):
    """With one expert nothing is routed, and XLA's count exceeds the formula only by small operations."""
    architecture = Architecture(
        DecoderConfig(vocab_size=1024, d_model=256, num_layers=4, num_dense_layers=3, dense_hidden=640, max_context=32),
        attention,
        MoEConfig(num_experts=1, k=1, expert_hidden=384, num_shared_experts=1),
    )
    execution = decoder.Execution(architecture, 1, Kernels("ragged_dot", "xla", "xla", "blocked"))
    rows = 4

    def step(params, cache, tokens_BT, start_B, valid_BT, live):
        x_BTD, cache, _ = decoder.extend(params, cache, tokens_BT, start_B, valid_BT, live, execution)
        return decoder.logits(params, x_BTD[:, -1]), cache

    def shape(*dimensions, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dimensions, dtype)

    cache = jax.eval_shape(lambda: caches.allocate(architecture, rows, 32, jnp.float32))
    tokens, valid = shape(rows, length), shape(rows, length, dtype=bool)
    live = policies.settings([MODEL_OWN] * rows, architecture, 1)
    start_B = None if start == 0 else shape(rows)
    lowered = jax.jit(step).lower(shapes_of(architecture), cache, tokens, start_B, valid, live)
    work = roofline.work(architecture, roofline.Step([start] * rows, [length] * rows, rows * length, 1), 4)
    assert 1 <= lowered.cost_analysis()["flops"] / work.flops < 1.05


def test_the_floor_is_the_longer_of_moving_and_computing():
    machine = roofline.Machine(bytes_per_s=10.0, flops_per_s=100.0)
    assert roofline.floor_s(roofline.Work(bytes=20, flops=100), machine) == 2
    assert roofline.floor_s(roofline.Work(bytes=20, flops=300), machine) == 3


def test_distinct_experts_of_independent_tokens():
    assert roofline.expected_distinct(64, 8, 1) == 8
    assert roofline.expected_distinct(64, 8, 2) == 15  # of the second token's experts an eighth is already counted
    random = np.random.default_rng(0)
    drawn = [len(set(np.concatenate([random.permutation(16)[:3] for _ in range(6)]).tolist())) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(roofline.expected_distinct(16, 3, 6), abs=0.1)


def test_the_published_formulas_of_a_feed_forward():
    """From arXiv 2505.03531: 3 d F + 2 N (d + F) numbers and 6 N d F operations."""
    assert roofline.ffn_work(5, 8, 12, 2) == roofline.Work(2 * (3 * 8 * 12 + 2 * 5 * (8 + 12)), 6 * 5 * 8 * 12)
    a800 = roofline.Machine(2.039e12, 312e12)
    dense = roofline.saturating_tokens(a800, 2048, 10944, 2)
    assert 150 < dense < 170  # "about 150"
    assert roofline.ffn_work(dense, 2048, 10944, 2).intensity == pytest.approx(312 / 2.039)
    assert roofline.saturating_tokens(a800, 64, 64, 2) == float("inf")


def test_the_published_formulas_of_what_devices_exchange():
    assert roofline.expert_parallel_elements(10, 8, 7168) == 2 * 8 * 10 * 7168
    assert roofline.tensor_parallel_elements(10, 8, 7168) == 2 * 7 * 10 * 7168


def test_weights_and_cache_may_have_numbers_of_other_sizes():
    architecture, step = tiny_model.ARCHITECTURE, roofline.Step([5, 9], [1, 1], 16, 8)
    cached = roofline.work(architecture, step, 1, 2).bytes - roofline.work(architecture, step, 1).bytes
    empty = dataclasses.replace(step, cached_B=[0, 0], new_B=[0, 0])
    assert cached == roofline.work(architecture, step, 1, 1).bytes - roofline.work(architecture, step, 1, 0).bytes
    assert roofline.work(architecture, empty, 1, 2).bytes == roofline.work(architecture, empty, 1).bytes
