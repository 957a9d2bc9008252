"""Kinds of policies: a new one is a class and an entry in the registry; the documentation lists all."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.architecture import MoEConfig
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies import registry
from moe_jax.routing.policies.columns import ModelFacts, PerLayer, constant, per_layer
from moe_jax.routing.policies.kind import Kind, RowWise, StepWise
from moe_jax.routing.policies.parse import parse
from moe_jax.routing.policies.step import holds
from moe_jax.routing.selection import Routing
from tests import tiny_model

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "policies.md"
B, E, L = 4, 8, 2
MOE = MoEConfig(num_experts=E, k=4, normalize=False, score="softmax", selection_bias=False)
MIX_BE = np.random.default_rng(4).permuted(np.tile(np.arange(1, E + 1), (B, 1)), axis=1).astype(np.float32) / E


@dataclasses.dataclass(frozen=True)
class AtLeast(RowWise):
    """`at_least:w`: slots i with w_i >= w."""

    name, form, sets = "at_least", "at_least:0.5", ("at_least",)
    w: PerLayer

    def columns(self, model):
        return (per_layer(model, self.w),)

    @classmethod
    def neutral(cls, model):
        return (constant(model, 0, np.float32),)

    @staticmethod
    def keeps(offered, w_N):
        return offered.mix_NK >= w_N[:, None]


@dataclasses.dataclass(frozen=True)
class Crowd(StepWise):
    """`crowd:n`: slots whose expert at least n rows keep, weighed by a table."""

    name, form, sets = "crowd", "crowd:2", ("crowd",)
    n: int

    def columns(self, model):
        return (constant(model, self.n),)

    @classmethod
    def neutral(cls, model):
        return (constant(model, 0),)

    @staticmethod
    def table(model):
        return np.array([1.0, 10.0], np.float32)

    @staticmethod
    def choose(slots, routing, same_BB, n_B, factor):
        held_BE = holds(slots, jnp.full(B, E), E)
        rows_BK = jnp.take_along_axis(same_BB.astype(int) @ held_BE.astype(int), slots.expert_NK, axis=1)
        mix_NK = jnp.where(n_B[:, None] > 0, factor, 1) * slots.mix_NK
        return slots._replace(mix_NK=mix_NK, keep_NK=slots.keep_NK & (rows_BK >= n_B[:, None]))


@pytest.fixture
def registered(monkeypatch):
    *others, last = registry.KINDS
    monkeypatch.setattr(registry, "KINDS", (AtLeast, *others, Crowd, last))


def bound(*specs):
    return policies.settings([parse(spec) for spec in specs], tiny_model.layers_of(MOE, L), MOE.k)


def kept(*specs, layer=1):
    """{expert: weight} for each row."""
    context = policies.Context(jnp.int32(layer), jnp.arange(B), jnp.ones(B, bool), 1)
    select = jax.jit(lambda routing, live: policies.select(routing, live, context, MOE, MOE.k))
    slots = jax.device_get(select(Routing(MIX_BE, MIX_BE), bound(*specs)))
    rows = zip(slots.expert_NK.tolist(), slots.weight_NK.tolist(), slots.keep_NK.tolist())
    return [{expert: weight for expert, weight, keep in zip(*row) if keep} for row in rows]


def best(row, k):
    return sorted(range(E), key=lambda expert: -MIX_BE[row, expert])[:k]


def test_a_new_kind_is_parsed(registered):
    policy = parse("crowd:2+topk:3+at_least:0.5")
    assert policy.spec == "at_least:0.5+topk:3+crowd:2" and policy.batch_aware
    assert not parse("at_least:0.5/0.25").batch_aware
    assert parse("at_least:0.5/0.25").parts == (AtLeast((0.5, 0.25)),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("at_last:0.5", r'"at_least:0.5", .*"crowd:2".*; did you mean "at_least:0.5"\?'),
        ("crowd", r'crowd.*expected n, as in "crowd:2"'),
        ("crowd:2+crowd:3", "crowd and crowd: expected one of them"),
    ],
)
def test_a_new_kind_is_named_in_errors(registered, spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


def test_the_columns_of_a_new_kind_are_bound(registered):
    without, having = bound("topk:2"), bound("topk:2", "crowd:2", "at_least:0.5/0.25")
    assert having.columns_BL.keys() - without.columns_BL.keys() == {"crowd"}  # row-wise columns are always present
    assert np.asarray(having.columns_BL["at_least"]).tolist() == [[0, 0], [0, 0], [0.5, 0.25]]
    assert np.asarray(having.columns_BL["crowd"]).tolist() == [[0, 0], [2, 2], [0, 0]]
    assert (without.tables.keys(), having.tables.keys()) == (set(), {"crowd"})
    with pytest.raises(ValueError, match=r"at_least:0.1/0.2/0.3: 3 numbers; expected one, or one for each"):
        bound("at_least:0.1/0.2/0.3")


def test_a_new_kind_acts_and_composes(registered):
    """Rows 0 and 1 act together; the expected slots follow from the definitions."""
    specs = ["topk:4+at_least:0.7+ratio:0.7+crowd:2"] * 2 + ["at_least:0.9/0.7", "model"]
    after_k = [
        [e for e in best(row, 4) if MIX_BE[row, e] >= 0.7 and MIX_BE[row, e] >= 0.7 * MIX_BE[row].max()]
        for row in (0, 1)
    ]
    expected = [{e: 10 * MIX_BE[row, e] for e in after_k[row] if e in after_k[1 - row]} for row in (0, 1)]
    expected.append({e: MIX_BE[2, e] for e in best(2, 4) if MIX_BE[2, e] >= 0.7})
    expected.append({e: MIX_BE[3, e] for e in best(3, 4)})
    assert kept(*specs) == expected  # eighths, whose products are exact
    assert 0 < len(expected[0]) < len(after_k[0]) and len(expected[2]) < 4  # each of them dropped something


def test_a_new_kind_changes_nothing_for_rows_without_it(registered, monkeypatch):
    specs = ("model", "ratio:0.5", "opportunistic:2", "topk:3+mass:0.5")
    having = kept(*specs)
    monkeypatch.setattr(registry, "KINDS", tuple(kind for kind in registry.KINDS if kind not in (AtLeast, Crowd)))
    assert kept(*specs) == having


def test_another_kind_does_not_compare_weights_again(monkeypatch):
    def compared():
        """How often the program has an array [B, K, K], which compares the slots of a token."""
        context = policies.Context(jnp.int32(0), jnp.arange(B), jnp.ones(B, bool), 1)
        program = jax.make_jaxpr(lambda mix, live: policies.select(Routing(mix, mix), live, context, MOE, MOE.k))
        return str(program(MIX_BE, bound(*["model"] * B))).count(f"[{B},{MOE.k},{MOE.k}]")

    before = compared()
    monkeypatch.setattr(registry, "KINDS", (AtLeast, *registry.KINDS))
    assert compared() == before > 0


@pytest.mark.parametrize("kind", registry.KINDS, ids=lambda kind: kind.name)
def test_columns_have_the_declared_names(kind):
    layers = 3 if kind.name == "layers" else 4
    calibration = Calibration(np.full(layers, 0.5, np.float32), np.zeros((layers, E, E), np.float32), np.zeros(1))
    model = ModelFacts(layers, E, 4, True, calibration)
    [part] = parse(kind.form).parts
    assert isinstance(part, kind) and part.spec == kind.form
    [owner] = [one for one in registry.KINDS if {*one.sets} & {*kind.sets} and one.neutral(model)]
    assert owner.sets == kind.sets and (owner is kind or kind.__base__ is Kind)  # a kind that acts on columns owns them
    columns, neutral = part.columns(model), owner.neutral(model)
    assert len(columns) == len(neutral) == len(kind.sets)
    for column_L, neutral_L in zip(columns, neutral):
        assert column_L.shape == neutral_L.shape == (layers,) and column_L.dtype == neutral_L.dtype


def test_names_differ():
    assert len({kind.name for kind in registry.KINDS}) == len(registry.KINDS)


@pytest.mark.parametrize("kind", registry.KINDS, ids=lambda kind: kind.name)
def test_the_documentation_has_every_kind(kind):
    written, _, keeps = kind.__doc__.splitlines()[0].partition(": ")
    sources = ", ".join(dict.fromkeys(re.findall(r"arXiv \d{4}\.\d{5}", kind.__doc__)))
    acts_on = "rows of a decode step" if issubclass(kind, StepWise) else "each token"
    row = f"| {written} | `{kind.form}` | {keeps.removesuffix('.')} | {acts_on} | {sources} |"
    assert row in DOCUMENT.read_text().splitlines()


def test_the_documentation_has_no_other_kind():
    rows = re.findall(r"^\| `(\w+)", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [kind.name for kind in registry.KINDS]  # in the order in which they act
