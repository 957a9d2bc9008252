"""Policies: specs are parsed, agree with plain loops, and neutral settings change nothing."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.policies.registry import KINDS
from moe_jax.routing.selection import Routing
from tests import tiny_model
from tests.routing import plain_policies as plain

E, K, B, L = 12, 5, 6, 3
MOE = MoEConfig(num_experts=E, k=4, normalize=True, routed_scaling=2.5)
SIMILARITY_LEE = np.random.default_rng(7).uniform(-1, 1, (L, E, E)).astype(np.float32)
CALIBRATION = Calibration(np.array([0.3, 0.5, 0.7], np.float32), SIMILARITY_LEE, np.zeros(1))
LAYER = 1


def bound(specs, moe=MOE, k_max=K, group_B=None):
    return policies.settings([parse(spec, CALIBRATION) for spec in specs], tiny_model.layers_of(moe, L), k_max, group_B)


@functools.partial(jax.jit, static_argnames=("steps", "moe", "k_max"))
def _select(score_NE, mix_NE, live, row_N, valid_N, steps=1, moe=MOE, k_max=K):
    context = policies.Context(jnp.int32(LAYER), row_N, valid_N, steps)
    return policies.select(Routing(score_NE, mix_NE), live, context, moe, k_max)


def select(score, mix, live, valid=None):
    """The selection of one decode step of B rows."""
    rows = len(score)
    valid = np.ones(rows, bool) if valid is None else valid
    return jax.device_get(_select(np.float32(score), np.float32(mix), live, np.arange(rows), valid))


def kept_of(selection):
    """[[expert, weight]] for each row."""
    return [
        [[int(e), float(w)] for e, w, keep in zip(*row) if keep]
        for row in zip(selection.expert_NK, selection.weight_NK, selection.keep_NK)
    ]


def experts_of(rows):
    return [[expert for expert, _ in row] for row in rows]


@st.composite
def routings(draw, rows=B):
    """Mixing weights in steps of 1/512, whose sums are exact, distinct within a row; and scores with a bias."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    mix_BE = np.stack([random.choice(np.arange(1, 512), E, replace=False) for _ in range(rows)]) / 512
    bias_E = random.integers(-300, 300, E) / 512 if draw(st.booleans()) else np.zeros(E)
    score_BE = mix_BE + bias_E + np.arange(E) / 2**16  # no ties
    if draw(st.booleans()):
        for row in range(rows):
            score_BE[row, random.choice(E, 3, replace=False)] = -np.inf
    return score_BE, mix_BE


def plain_slots(routing, spec, groups=None, own_k=None):
    """The slots that plain loops keep for every row, before weighting; `spec` is parsed here by hand."""
    score_BE, mix_BE = routing
    groups = groups or [0] * len(score_BE)
    rows = [(list(score), list(mix), group) for score, mix, group in zip(score_BE, mix_BE, groups)]
    parts = dict(part.partition(":")[::2] for part in spec.split("+"))
    k = int(parts["topk"]) if "topk" in parts else own_k or MOE.k
    kept = [plain.topk(score, mix, k) for score, mix, _ in rows]
    words = {kind: text.split(",") for kind, text in parts.items()}

    def least(kind):
        return next((int(word[4:]) for word in words[kind] if word.startswith("min=")), 1)

    if "ratio" in parts or "median" in parts:
        t = float(words["ratio"][0]) if "ratio" in parts else float(CALIBRATION.median_ratio_L[LAYER])
        by_ratio = [plain.ratio(slots, t, least("ratio" if "ratio" in parts else "median")) for slots in kept]
    else:
        by_ratio = kept
    if "mass" in parts:
        by_mass = [plain.mass(slots, float(words["mass"][0]), least("mass")) for slots in kept]
        kept = [[slot for slot in one if slot in other] for one, other in zip(by_ratio, by_mass)]
    else:
        kept = by_ratio
    if "opportunistic" in parts:
        kept = plain.opportunistic(rows, kept, int(parts["opportunistic"]))
    if "budget" in parts:
        floor = next((int(word[6:]) for word in words["budget"] if word.startswith("floor=")), 1)
        kept = plain.budget(rows, kept, int(words["budget"][0]), floor)
    if "reroute" in parts:
        kept = plain.reroute(rows, kept, int(words["reroute"][0]), float(words["reroute"][1]), SIMILARITY_LEE[LAYER])
    if "capacity" in parts:
        overflow = "next" if "overflow=next" in words["capacity"] else "drop"
        kept = plain.capacity(rows, kept, float(words["capacity"][0]), overflow)
    rule = parts.get("renormalize")
    return [
        plain.weighted(slots, score, mix, MOE.k, MOE.normalize, MOE.routed_scaling, rule)
        for slots, (score, mix, _) in zip(kept, rows)
    ]


SPECS = [
    *("model", "topk:1", "topk:5", "ratio:0.5", "ratio:0.9,min=2", "median", "median:min=3", "mass:0.5"),
    *("mass:0.7,min=3", "topk:5+ratio:0.25+mass:0.75", "ratio:0.5+renormalize:none", "topk:2+renormalize:own"),
    *("opportunistic:1", "opportunistic:2", "topk:5+opportunistic:3", "budget:5", "budget:3,floor=2", "budget:12"),
    *("reroute:1,0.25", "reroute:2,-1.0", "topk:5+reroute:2,0.5", "capacity:0.5", "capacity:1.0", "capacity:2.0"),
    *("capacity:0.5,overflow=next", "capacity:1.0,overflow=next", "ratio:0.5+opportunistic:1"),
    *("mass:0.75+budget:6", "topk:5+ratio:0.25+opportunistic:2+capacity:1.0,overflow=next+renormalize:none"),
]


@pytest.mark.parametrize("spec", SPECS)
@hypothesis.given(routing=routings(), groups=st.lists(st.integers(0, 1), min_size=B, max_size=B))
@hypothesis.settings(deadline=None, max_examples=25)
def test_a_policy_equals_its_plain_loop(spec, routing, groups):
    got = kept_of(select(*routing, bound([spec] * B, group_B=groups)))
    expected = plain_slots(routing, spec, groups)
    assert experts_of(got) == experts_of(expected)
    for one, other in zip(got, expected):
        np.testing.assert_allclose([w for _, w in one], [w for _, w in other], rtol=1e-6)


NEUTRAL = [
    *("topk:4", "layers:4,4,4", "schedule:4,4,4,1", "ratio:0", "mass:1", "ratio:1,min=4", "mass:0,min=4"),
    *("opportunistic:4", "budget:12", "reroute:4,-1.0", "reroute:1,2.0", "capacity:12", "capacity:12,overflow=next"),
    *("renormalize:one", "renormalize:own", "ratio:0+mass:1+opportunistic:4+budget:12+reroute:1,2.0+capacity:12"),
]


@pytest.mark.parametrize("spec", NEUTRAL)
@hypothesis.given(routing=routings())
@hypothesis.settings(deadline=None, max_examples=10)
def test_neutral_settings_are_the_identity_bit_for_bit(spec, routing):
    got, expected = (select(*routing, bound([one] * B)) for one in (spec, "model"))
    for one, other in zip(got, expected):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", SPECS)
@hypothesis.given(routing=routings(), order=st.permutations(range(B)))
@hypothesis.settings(deadline=None, max_examples=10)
def test_the_order_of_a_batch_does_not_matter(spec, routing, order):
    score_BE, mix_BE = routing
    mix_BE = mix_BE + np.arange(B)[:, None] / 2**14  # no two rows have the same weight
    live = bound([spec] * B)
    straight = kept_of(select(score_BE, mix_BE, live))
    shuffled = kept_of(select(score_BE[list(order)], mix_BE[list(order)], live))
    assert shuffled == [straight[b] for b in order]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not parse(spec, CALIBRATION).batch_aware])
@hypothesis.given(routing=routings(), k=st.integers(1, K))
@hypothesis.settings(deadline=None, max_examples=10)
def test_row_wise_policies_keep_no_more_than_they_are_given(spec, routing, k):
    rest = "+".join(part for part in spec.split("+") if not part.startswith(("topk", "model")))
    given = kept_of(select(*routing, bound([f"topk:{k}"] * B)))
    kept = kept_of(select(*routing, bound([f"topk:{k}" + (f"+{rest}" if rest else "")] * B)))
    for one, other in zip(kept, given):
        assert len(one) >= 1 and {e for e, _ in one} <= {e for e, _ in other}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if parse(spec, CALIBRATION).batch_aware])
@hypothesis.given(routing=routings(), valid=st.lists(st.booleans(), min_size=B, max_size=B))
@hypothesis.settings(deadline=None, max_examples=10)
def test_padding_and_finished_rows_have_no_effect(spec, routing, valid):
    valid = np.array(valid)
    kept = kept_of(select(*routing, bound([spec] * B), valid))
    assert all(not slots for slots, is_valid in zip(kept, valid) if not is_valid)
    alone = plain_slots(tuple(part[valid] for part in routing), spec) if valid.any() else []
    assert experts_of(slots for slots, is_valid in zip(kept, valid) if is_valid) == experts_of(alone)


def test_requests_of_other_policies_have_no_effect():
    score_BE = np.random.default_rng(3).uniform(0.1, 1, (B, E))
    specs = ["opportunistic:1", "opportunistic:1", "budget:3", "budget:3", "ratio:0.8", "model"]
    together = kept_of(select(score_BE, score_BE, bound(specs)))
    for rows in ([0, 1], [2, 3], [4], [5]):
        expected = plain_slots((score_BE[rows], score_BE[rows]), specs[rows[0]])
        assert experts_of(together[b] for b in rows) == experts_of(expected)


def test_steps_side_by_side_equal_steps_one_by_one():
    """[B, T] tokens, each position a decode step; and a prefill, in which the same policy does nothing."""
    steps = 4
    score_BTE = np.random.default_rng(5).uniform(0.1, 1, (B, steps, E)).astype(np.float32)
    live = bound(["opportunistic:1"] * 3 + ["capacity:1.0"] * 3)
    flat = score_BTE.reshape(-1, E)
    row_N, valid_N = np.repeat(np.arange(B), steps), np.ones(B * steps, bool)

    def run(context_steps):
        return kept_of(jax.device_get(_select(flat, flat, live, row_N, valid_N, steps=context_steps)))

    together = run(steps)
    for step in range(steps):
        one = kept_of(select(score_BTE[:, step], score_BTE[:, step], live))
        assert experts_of(together[step::steps]) == experts_of(one)
    assert experts_of(run(0)) == experts_of(plain.topk(row, row, MOE.k) for row in flat)


def test_changing_settings_or_mixing_requests_compiles_nothing():
    score_BE = np.random.default_rng(3).uniform(0.1, 1, (B, E))
    mixed = ["opportunistic:2", "budget:5,floor=2", "topk:2", "ratio:0.4", "capacity:1.5", "reroute:2,0.5"]
    select(score_BE, score_BE, bound(mixed))
    select(score_BE, score_BE, bound(["model"] * B))
    compiled = _select._cache_size()
    for specs in (
        ["topk:1", "ratio:0.3,min=2", "mass:0.5", "median", "layers:1,2,3", "schedule:1,4,2,1+renormalize:none"],
        ["opportunistic:1", "budget:3", "model", "mass:0.3", "capacity:0.5,overflow=next", "reroute:1,0.1"],
        ["reroute:3,0.9"] + ["topk:3"] * 2 + ["capacity:3", "budget:9", "opportunistic:4"],
    ):
        select(score_BE, score_BE, bound(specs))
    assert _select._cache_size() == compiled


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rule", ["none", "own", "one", None])
@pytest.mark.parametrize("k_max", [2, 4, 6])
def test_renormalisation_with_fewer_and_more_static_slots(normalize, rule, k_max):
    moe = MoEConfig(num_experts=E, k=4, normalize=normalize, routed_scaling=1.5)
    score_BE = np.random.default_rng(4).uniform(0.1, 1, (B, E)).astype(np.float32)
    live = bound(["topk:2" + (f"+renormalize:{rule}" if rule else "")] * B, moe, k_max)
    rows = np.arange(B), np.ones(B, bool)
    got = kept_of(jax.device_get(_select(score_BE, score_BE, live, *rows, moe=moe, k_max=k_max)))
    for row, mix in zip(got, np.float64(score_BE)):
        expected = plain.weighted(plain.topk(mix, mix, 2), mix, mix, 4, normalize, 1.5, rule)
        assert [e for e, _ in row] == [e for e, _ in expected]
        np.testing.assert_allclose([w for _, w in row], [w for _, w in expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("model", [4, 4, 4]),
        ("topk:3", [3, 3, 3]),
        ("layers:1,2,5", [1, 2, 5]),
        (" topk:3 ", [3] * 3),
        ("schedule:1,5,2,1", [1, 5, 2]),
    ],
)
def test_k_of_each_layer(spec, expected):
    assert np.asarray(bound([spec]).columns_BL["k"]).tolist() == [expected]


def test_a_schedule_is_linear_between_its_ends_and_rounds_halves_up():
    live = policies.settings([parse("schedule:6,8,2,4")], tiny_model.layers_of(MoEConfig(num_experts=E, k=8), 11), 8)
    assert np.asarray(live.columns_BL["k"]).tolist() == [[6, 7, 7, 8, 8, 7, 6, 5, 4, 3, 2]]


def test_thresholds_may_differ_by_layer():
    assert np.asarray(bound(["ratio:0.5/0.25/0.125"]).columns_BL["ratio"]).tolist() == [[0.5, 0.25, 0.125]]
    np.testing.assert_allclose(bound(["median:scale=0.5"]).columns_BL["ratio"], [[0.15, 0.25, 0.35]])


@pytest.mark.parametrize("spec", [*SPECS, *NEUTRAL, "ratio:0.5/0.25/0.125,min=2", *(kind.form for kind in KINDS)])
def test_a_spec_prints_as_it_parses(spec):
    assert parse(parse(spec).spec) == parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk:0", "at least 1"),
        ("topk:-2", "at least 1"),
        ("topk:two", "whole numbers"),
        ("topk:3000000000", "whole numbers"),
        ("layers:3000000000,1,1", "whole numbers"),
        ("topk:2,3", "'3' is not known here; expected k"),
        ("topk", "expected k"),
        ("model:3", "expected nothing after its name"),
        ("layers:", "whole numbers"),
        ("layers:8,,4", "whole numbers"),
        ("top_k:3", 'did you mean "topk:4"'),
        ("", "expected one of the forms"),
        ("topk:3+", "expected one of the forms"),
        ("topk:3+layers:1,2,3", "topk and layers: expected one of them"),
        ("ratio:0.2+ratio:0.3", "ratio and ratio: expected one of them"),
        ("ratio:1.5", "numbers from 0 to 1"),
        ("ratio:nan", "numbers from 0 to 1"),
        ("ratio:0.3,least=2", "'least=2' is not known here; expected t, min=..."),
        ("ratio:0.3,min=0", "at least 1"),
        ("mass:much", "'much': expected numbers"),
        ("schedule:1,2,3", "expected b, h, e, p"),
        ("budget:0", "at least 1"),
        ("reroute:2", "expected k0, s"),
        ("capacity:-1", "numbers from 0 on"),
        ("capacity:1,overflow=spill", "overflow = drop or next"),
        ("renormalize:two", "none, own, one"),
    ],
)
def test_refused(spec, message):
    with pytest.raises(ValueError, match=r"policy '") as refusal:
        parse(spec)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk:9", r"topk:9.*expected 1 to 5 experts.*policy.k_max"),
        ("layers:1,2", r"2 layers; expected one number for each of the model's 3"),
        ("ratio:0.1/0.2", r"2 numbers; expected one, or one for each of the model's 3"),
        ("schedule:2,4,2,2", r"p = 2; expected a layer between the first MoE layer, 0, and the last, 2"),
    ],
)
def test_refused_by_the_model(spec, message):
    with pytest.raises(ValueError, match=message):
        bound([spec])


@pytest.mark.parametrize("spec", ["median", "reroute:2,0.5"])
def test_a_missing_calibration_is_refused(spec):
    with pytest.raises(ValueError, match=r"policy.calibration.*launch/calibrate.py"):
        policies.settings([parse(spec)], tiny_model.layers_of(MOE, L), K)
    with pytest.raises(ValueError, match="other layers or experts"):
        policies.settings([parse(spec, CALIBRATION)], tiny_model.layers_of(MOE, L + 1), K)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_models_own_weights_are_those_of_each_layers_own_k(normalize):
    """If k differs between layers, `own` and the model's own rule use the layer's k."""
    moe = MoEConfig(num_experts=6, k=4, k_of_layers=(2, 4), normalize=normalize, score="softmax", selection_bias=False)
    architecture = Architecture(DecoderConfig(num_layers=2, num_dense_layers=0), AttentionConfig(), moe)
    mix_NE = np.random.default_rng(0).dirichlet(np.ones(6), 3).astype(np.float32)
    routing, best_first_NE = Routing(jnp.asarray(mix_NE), jnp.asarray(mix_NE)), -np.sort(-mix_NE, axis=1)
    for spec in ("model", "renormalize:none", "renormalize:own", "topk:1+renormalize:own"):
        live = policies.settings([parse(spec)] * 3, architecture, 4)
        for layer, k in enumerate(moe.k_of_layers):
            context = policies.Context(jnp.int32(layer), jnp.arange(3), jnp.ones(3, bool), 0)
            sum_N = policies.select(routing, live, context, moe, 4).weight_NK.sum(axis=1)
            own_N = best_first_NE[:, :k].sum(axis=1)
            expected_N = np.ones(3) if normalize else own_N
            np.testing.assert_allclose(sum_N, expected_N, rtol=1e-6, err_msg=f"{spec}, layer {layer}")
