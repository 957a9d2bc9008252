"""Sets a searched schedule beside others of the same budget, on text that the search did not see."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.evaluation.concurrent import Windows
from moe_jax.evaluation.intervals import Estimate, paired_ratio, ratio
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.study import schedules
from moe_jax.study.schedule_search import Policies, SearchedSchedule, rules, spec_of
from moe_jax.study.schedules import KPerLayer

SEARCHED, LINEAR, ORACLE, PLAIN, LEXI, UNIFORM = "searched", "linear", "oracle", "plain", "lexi", "uniform"
SHORTLIST = 10  # the best on the windows of screening, or more if more are judged, are measured on all


class MeasuredPolicy(NamedTuple):
    """A policy and its cost on the calibration text."""

    spec: str
    cost: float  # nats per token


class LinearSchedules(NamedTuple):
    """All schedules (b,h,e,p) of a budget."""

    schedule_of: dict[KPerLayer, str]  # the spec of each
    screened: dict[KPerLayer, float]  # cost of each under the model's own rule, on the windows of screening
    best: Sequence[MeasuredPolicy]  # the best ones on all windows, best first, under any rule
    plain: Sequence[MeasuredPolicy]  # the same, under the model's own rule


class BudgetResult(NamedTuple):
    """What was found and measured for one budget."""

    budget: float
    found: Sequence[SearchedSchedule]  # under each rule, the better one first
    linear: LinearSchedules
    lexi: MeasuredPolicy
    uniform: MeasuredPolicy | None  # None: the budget is not a whole number

    @property
    def searched(self) -> SearchedSchedule:
        """The better one of `found`."""
        return self.found[0]

    @property
    def compared(self) -> list[str]:
        """The specs of all policies that are judged."""
        named = [self.searched, *self.linear.best, *self.linear.plain[:1], self.lexi, *filter(None, [self.uniform])]
        return list(dict.fromkeys(one.spec for one in named))


class JudgedPolicy(NamedTuple):
    """A policy on held-out text."""

    role: str
    spec: str
    cost: float  # on calibration text
    bits_per_byte: Estimate
    increase: Estimate  # over the full model, paired by document: 0.01 is 1% more bits
    kl: Estimate  # nats per token
    searched: Estimate | None  # bits of the searched schedule relative to this one: below zero it needs fewer


def linear_schedules(
    screening: Policies, measured: Policies, architecture: Architecture, total: int, count: int
) -> LinearSchedules:
    """Measures all schedules (b,h,e,p) of a total under each rule, and those that are best again on all windows.

    Args:
        screening: scores policies on a part of the calibration text.
        measured: scores `SHORTLIST` of them on all of it.
        architecture: the model's architecture.
        total: experts of all layers together.
        count: how many go on to be judged; 0: none is measured.
    """
    schedule_of = dict(schedules.linear(architecture, total)) if count else {}
    if not schedule_of:
        return LinearSchedules({}, {}, [], [])
    own_rule, other_rule = rules(architecture)
    plain, other = (screening.costs(spec_of(k_L, rule) for k_L in schedule_of) for rule in (own_rule, other_rule))
    costs = {(k_L, own_rule): cost for k_L, cost in zip(schedule_of, plain.tolist())}
    costs |= {(k_L, other_rule): cost for k_L, cost in zip(schedule_of, other.tolist())}

    def best(keys: Iterable[tuple[KPerLayer, str]]) -> list[MeasuredPolicy]:
        first = sorted(keys, key=costs.__getitem__)[: max(SHORTLIST, count)]
        again = measured.costs(spec_of(k_L, rule) for k_L, rule in first).tolist()
        found = [MeasuredPolicy(schedule_of[k_L] + rule, cost) for (k_L, rule), cost in zip(first, again)]
        return sorted(found, key=lambda one: one.cost)[:count]

    screened = dict(zip(schedule_of, plain.tolist()))
    return LinearSchedules(schedule_of, screened, best(costs), best((k_L, own_rule) for k_L in schedule_of))


def better(measured: Policies, architecture: Architecture, specs: str) -> MeasuredPolicy:
    """A schedule under the rule that costs less on calibration text."""
    candidates = [specs + rule for rule in rules(architecture)]
    return min(map(MeasuredPolicy, candidates, measured.costs(candidates).tolist()), key=lambda one: one.cost)


def judge(budgets: Sequence[BudgetResult], held_out: Policies, windows: Windows) -> list[list[JudgedPolicy]]:
    """Measures what was found on held-out text: for each budget the searched schedule, then the others.

    `linear` is the schedule (b,h,e,p) that is best on calibration text, as a user would choose it; `oracle` is the one
    of `LinearSchedules.best` that needs the fewest bits on the held-out text itself, which favours it. `plain` is as
    published: the best on calibration text under the model's own rule.
    """
    _, document_J = np.unique(windows.document_J, return_inverse=True)
    size_J, tokens_J = (np.bincount(document_J, one) for one in (windows.bytes_J, held_out.tokens_of_windows))
    specs = list(dict.fromkeys(["model", *(spec for budget in budgets for spec in budget.compared)]))
    together = held_out.score(specs)
    bits = {spec: np.bincount(document_J, nats_J) / np.log(2) for spec, nats_J in zip(specs, together.nats_JP.T)}
    kl = {spec: np.bincount(document_J, kl_J) for spec, kl_J in zip(specs, together.kl_JP.T)}
    judged = []
    for budget in budgets:
        named = [(SEARCHED, budget.searched)]
        if budget.linear.best:
            oracle = min(budget.linear.best, key=lambda one: bits[one.spec].sum())
            named += [(LINEAR, budget.linear.best[0]), (ORACLE, oracle), (PLAIN, budget.linear.plain[0])]
        named += [(LEXI, budget.lexi), *([(UNIFORM, budget.uniform)] if budget.uniform else [])]
        own = bits[budget.searched.spec]
        judged.append(
            [
                JudgedPolicy(
                    role,
                    one.spec,
                    one.cost,
                    ratio(bits[one.spec], size_J),
                    paired_ratio(bits[one.spec], bits[MODEL_OWN.spec]),
                    ratio(kl[one.spec], tokens_J),
                    None if role == SEARCHED else paired_ratio(own, bits[one.spec]),
                )
                for role, one in named
            ]
        )
    return judged
