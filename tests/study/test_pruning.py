"""Which experts each method keeps, what is refused, and how many each layer keeps."""

import re

import numpy as np
import pytest

from moe_jax.config.architecture import MoEConfig
from moe_jax.config.pruning import BY_PLACE, MEASURED, PruneConfig
from moe_jax.study import pruning
from moe_jax.study.expert_statistics import ExpertStatistics
from moe_jax.study.pruning import PruningChoice
from tests.tiny_model import layers_of

LAYERS, EXPERTS = 3, 12
ARCHITECTURE = layers_of(MoEConfig(num_experts=EXPERTS, k=2), LAYERS)
GROUPED = layers_of(MoEConfig(num_experts=EXPERTS, k=4, num_groups=3, num_groups_kept=2), LAYERS)
RANDOM = np.random.default_rng(0)
STATISTICS = ExpertStatistics(RANDOM.integers(1, 90, (LAYERS, EXPERTS)), *RANDOM.random((3, LAYERS, EXPERTS)))


def kept(method, keep, architecture=ARCHITECTURE, seed=0, **choice):
    return [
        list(map(int, own))
        for own in pruning.kept(PruningChoice(method, keep, **choice), architecture, STATISTICS, seed)
    ]


def plain_scores(method):
    """By layer and expert, from the definitions."""
    count, weight, weighted_norm, contribution = (field.tolist() for field in STATISTICS)
    if method == "reap":
        return [[one / n for one, n in zip(*both)] for both in zip(weighted_norm, count)]
    return {"count": count, "soft_count": weight, "output_aware": contribution}[method]


def test_every_method_has_its_scores():
    assert {*pruning.BY_STATISTICS} == {*MEASURED} and {*pruning.BY_INDEX} == {*BY_PLACE}


@pytest.mark.parametrize("method", MEASURED)
def test_the_experts_with_the_best_scores_stay(method):
    scores = plain_scores(method)
    expected = [sorted(sorted(range(EXPERTS), key=lambda e: -own[e])[:5]) for own in scores]
    assert kept(method, 5) == expected
    by_group = [
        sorted(e for first in (0, 4, 8) for e in sorted(range(first, first + 4), key=lambda e: -own[e])[:2])
        for own in scores
    ]
    assert kept(method, 6, GROUPED) == by_group


def test_an_expert_that_no_token_chose_has_the_least_score():
    idle = STATISTICS._replace(count_LE=STATISTICS.count_LE.copy(), weighted_norm_LE=STATISTICS.weighted_norm_LE.copy())
    idle.count_LE[:, 3] = idle.weighted_norm_LE[:, 3] = 0
    assert all(3 not in own for own in pruning.kept(PruningChoice("reap", EXPERTS - 1), ARCHITECTURE, idle, 0))


def test_of_equal_scores_the_lower_index_stays():
    assert pruning.best(np.zeros(8), 4, 2).tolist() == [0, 1, 4, 5]


def test_halves_by_place():
    assert kept("odd", 6) == [[1, 3, 5, 7, 9, 11]] * LAYERS
    assert kept("even", 6) == [[0, 2, 4, 6, 8, 10]] * LAYERS
    assert kept("first_half", 6) == [[0, 1, 2, 3, 4, 5]] * LAYERS
    assert kept("last_half", 6) == [[6, 7, 8, 9, 10, 11]] * LAYERS
    assert kept("last_half", 6, GROUPED) == [[2, 3, 6, 7, 10, 11]] * LAYERS  # of each group


def test_random_draws_differ_and_are_repeated_by_their_seed():
    draws = [kept("random", 6, draw=draw) for draw in range(5)]
    assert len({str(one) for one in draws}) == 5 and draws == [kept("random", 6, draw=draw) for draw in range(5)]
    assert draws[0] != kept("random", 6, seed=1) and draws[0][0] != draws[0][1]
    assert all(sum(4 * r <= e < 4 * r + 4 for e in own) == 2 for own in kept("random", 6, GROUPED) for r in range(3))


def test_across_layers_the_best_of_all_stay_and_every_layer_keeps_its_k():
    scores = np.array(plain_scores("reap"))
    relative = scores / scores.mean(axis=1, keepdims=True)
    found = kept("reap", 4, across_layers=True)
    assert sum(map(len, found)) == 4 * LAYERS and len({*map(len, found)}) > 1
    for own, score_E in zip(found, relative):
        assert len(own) >= 2 and own == sorted(sorted(range(EXPERTS), key=lambda e: -score_E[e])[: len(own)])
    free = [(layer, e) for layer, own in enumerate(found) for e in sorted(own, key=lambda e: -relative[layer][e])[2:]]
    worst = min(relative[layer][e] for layer, e in free)
    left = [relative[layer][e] for layer, own in enumerate(found) for e in range(EXPERTS) if e not in own]
    assert worst > max(left)
    even = [np.array([9.0, 8, 7, 1]), np.array([1.0, 1, 1, 1])]
    assert [own.tolist() for own in pruning.best_across(even, 5, (1, 3))] == [[0, 1], [0, 1, 2]]


def test_the_models_of_a_run():
    config = PruneConfig(methods=("random", "odd", "count"), across_layers=("reap",), keep=(8, 6), draws=2)
    names = [choice.name for choice in pruning.choices(config, ARCHITECTURE)]
    assert names == [
        *("random_8_0", "random_8_1", "count_8", "reap_across_layers_8"),
        *("random_6_0", "random_6_1", "odd_6", "count_6", "reap_across_layers_6"),
    ]
    assert pruning.choices(config, ARCHITECTURE)[0].group == "random_8"


@pytest.mark.parametrize(
    ("settings", "architecture", "says"),
    [
        ({"keep": (13,)}, ARCHITECTURE, "prune.keep = 13: expected at most the 12 experts"),
        ({"keep": (1,)}, ARCHITECTURE, "prune.keep = 1: expected room for the model's k = 2"),
        (
            {"keep": (1,), "methods": (), "across_layers": ("reap",)},
            ARCHITECTURE,
            "expected at least the model's k = 2",
        ),
        ({"keep": (5,)}, GROUPED, "prune.keep = 5: expected a multiple of moe.num_groups = 3"),
        ({"keep": (3,)}, GROUPED, "k = 4, of which a token reaches 2: 2 of 3 groups"),
        ({"keep": (6,), "across_layers": ("reap",)}, GROUPED, "prune.across_layers = ('reap',): expected ()"),
        (
            {"keep": (8,), "methods": ("count", "odd")},
            ARCHITECTURE,
            "'odd', which keeps half of the experts: expected 6",
        ),
        ({"keep": (6,), "export": ("reap_8",)}, ARCHITECTURE, "prune.export = 'reap_8': expected one of count_6"),
    ],
)
def test_what_a_model_cannot_have_is_refused(settings, architecture, says):
    config = PruneConfig(**{"methods": ("count",), "across_layers": (), **settings})
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        pruning.choices(config, architecture)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": ("reep",)}, "prune.methods = ('reep',): expected some of random"),
        ({"across_layers": ("random",)}, "prune.across_layers = ('random',): expected some of count"),
        ({"methods": ("reap", "reap")}, "each once"),
        ({"methods": (), "across_layers": ()}, "at least one method"),
        ({"keep": ()}, "prune.keep = (): expected positive numbers"),
        ({"keep": (0,)}, "expected positive numbers"),
        ({"keep": (8, 8)}, "each number once"),
        ({"draws": 0}, "prune.draws = 0: expected a positive number"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        PruneConfig(**settings)
