"""Which layers a model has: their stacks, and the loops in which they run."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import layer_order
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig


def made(pattern):
    """An architecture from one number per layer: 0 for a dense layer, else its number of experts."""
    dense, experts = [n for n, e in enumerate(pattern) if not e], tuple(e for e in pattern if e)
    places = {"num_dense_layers": len(dense), "dense_layers": tuple(dense)}
    moe = MoEConfig(num_experts=max(experts), k=1, num_experts_of_layers=experts)
    return Architecture(DecoderConfig(num_layers=len(pattern), **places), AttentionConfig(), moe)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ([8, 8, 8, 8], [(1, 4)]),
        ([0, 8, 8, 8], [(1, 1), (1, 3)]),
        ([0, 0, 0, 8, 8], [(1, 3), (1, 2)]),
        ([0, 8] * 5, [(2, 5)]),
        ([8, 8, 8, 0] * 3, [(4, 3)]),
        ([0] + [8, 4] * 6, [(1, 1), (2, 6)]),
        ([8, 8, 0, 8, 8, 8], [(1, 2), (1, 1), (1, 3)]),
        ([8, 7, 6, 5], [(1, 1)] * 4),
    ],
)
def test_a_repeating_pattern_becomes_a_loop(pattern, found):
    blocks = layer_order.blocks(made(pattern))
    assert [(len(block.layers), block.times) for block in blocks] == found


@given(st.lists(st.sampled_from([0, 4, 6, 8]), min_size=1, max_size=20).filter(any))
def test_blocks_hold_all_layers_in_order(pattern):
    architecture = made(pattern)
    passes = (block.at(time) for block in layer_order.blocks(architecture) for time in range(block.times))
    run = list(itertools.chain(*passes))
    assert [layer.number for layer in run] == list(range(len(pattern)))
    assert [layer.column for layer in run if layer.is_moe] == list(range(len(pattern) - pattern.count(0)))
    stacks = layer_order.stacks(architecture)
    assert sorted(itertools.chain(*stacks.values())) == list(range(len(pattern)))
    for layer, experts in zip(run, pattern, strict=True):
        assert stacks[layer.stack][layer.index] == layer.number
        assert layer.is_moe == bool(experts) == (layer_order.kind_of(layer.stack) == layer_order.MOE)
        if experts:
            assert layer_order.moe_of(architecture, layer.stack).num_experts == experts


@given(st.integers(0, 5), st.integers(1, 5))
def test_a_dense_prefix_may_be_given_by_its_length(dense, moe):
    by_length = Architecture(DecoderConfig(num_layers=dense + moe, num_dense_layers=dense))
    assert layer_order.layers(by_length) == layer_order.layers(made([0] * dense + [8] * moe))
    assert layer_order.blocks(by_length) == layer_order.blocks(made([0] * dense + [8] * moe))


@pytest.mark.parametrize(
    ("section", "settings", "words"),
    [
        ("decoder", {"dense_layers": (1, 1), "num_dense_layers": 2}, "decoder.dense_layers"),
        ("decoder", {"dense_layers": (1,), "num_dense_layers": 2}, "decoder.num_dense_layers = 2 different"),
        ("decoder", {"dense_layers": (4,), "num_dense_layers": 1}, "num_layers - 1 = 3"),
        ("moe", {"num_experts_of_layers": (64, 32)}, "one for each of 3 MoE layers"),
        ("moe", {"num_experts_of_layers": (64, 32, 65)}, "the largest of them moe.num_experts = 64"),
        ("moe", {"num_experts_of_layers": (64, 32, 0)}, "at least 1"),
        ("moe", {"num_experts_of_layers": (64, 32, 4)}, "k of MoE layer 2 = 8: expected at most its 4 experts"),
        ("moe", {"num_experts_of_layers": (64, 32, 32), "num_groups": 4, "num_groups_kept": 2}, "moe.num_groups = 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(section, settings, words):
    architecture = Architecture(DecoderConfig(num_layers=4))
    with pytest.raises(ValueError) as refused:
        changed = dataclasses.replace(getattr(architecture, section), **settings)
        dataclasses.replace(architecture, **{section: changed})
    assert words in str(refused.value) and "\n" not in str(refused.value)
