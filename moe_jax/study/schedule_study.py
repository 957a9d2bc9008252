"""The whole study of schedules: searched for every budget, then compared on text that the search did not see."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.schema import SearchConfig
from moe_jax.evaluation import concurrent
from moe_jax.evaluation.journal import Journal
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.study import lexi, schedule_rivals, schedules
from moe_jax.study.rank_agreement import Agreement, agreement, ranks_of_schedules
from moe_jax.study.schedule_rivals import BudgetResult, JudgedPolicy
from moe_jax.study.schedule_search import Policies, marginal_costs, rules, search, spec_of
from moe_jax.text.documents import Document
from moe_jax.text.tokenizer import encode_documents

SCREENED = 4  # the windows over those on which all schedules (b,h,e,p) are measured
POOL = 8  # times the windows needed: what they are picked from


class Searched(NamedTuple):
    """All results of a search."""

    budgets: Sequence[BudgetResult]
    judged: Sequence[Sequence[JudgedPolicy]]  # for each budget
    marginal_LK: dict[str, np.ndarray]  # by rule
    lexi_LK: np.ndarray
    lexi_agreement: Agreement
    marginal_ranks: Sequence[float]  # of the sums of marginal costs, as `Agreement.schedules_of_budgets`
    measured: int  # schedules that were measured on all calibration text

    @property
    def policies(self) -> tuple[str, ...]:
        """What was found, each once."""
        return tuple(dict.fromkeys(budget.searched.spec for budget in self.budgets))


def calibration_windows(documents: Sequence[Document], tokenizer, config: SearchConfig, seed: int) -> np.ndarray:
    """tokens_JT int32: full windows of documents in a random order, T inputs and the label of the last.

    Documents are read until they have `POOL` times the windows that are picked: few of a large text are encoded.

    Raises:
        ValueError: the documents have too few windows.
    """
    length, found = config.context, []
    for number in np.random.default_rng(seed).permutation(len(documents)):
        [ids] = encode_documents(tokenizer, [documents[number]])
        found += [ids[end - length : end + 1] for end in range(length, len(ids), length)]
        if len(found) >= POOL * config.windows:
            break
    if len(found) < config.windows:
        raise ValueError(
            f"text.sources has {len(found)} full windows of {length} tokens: expected at least {config.windows}; name "
            "more text, or lower search.windows or search.context"
        )
    picked = np.random.default_rng(seed).permutation(len(found))[: config.windows]
    return np.int32([found[number] for number in picked])


def run(
    params: Params,
    calibration_JT: np.ndarray,
    windows: concurrent.Windows,
    config: SearchConfig,
    seed: int,
    execution: Execution,
    journal: Journal,
    advance: Callable[[int], object],
) -> Searched:
    """Searches a schedule for every budget, and judges it.

    Args:
        params: as `decoder.split` gives them.
        calibration_JT: as `calibration_windows` gives them.
        windows: of held-out text.
        config: the section of the configuration.
        seed: of LExI's draws.
        execution: the static half of the step, with slots for the model's own k.
        journal: keeps every batch of measurements.
        advance: is called with the number of schedules that have been measured.

    Raises:
        ValueError: a budget is not possible, see `schedules.totals`.
    """
    architecture = execution.architecture
    totals = schedules.totals(config.budgets, architecture)

    def scored(name: str, tokens_JT: np.ndarray) -> Policies:
        return Policies(params, tokens_JT, execution, journal, name, advance)

    measured = scored("calibration", calibration_JT)
    screening = scored("screening", calibration_JT[: -(-len(calibration_JT) // SCREENED)])
    marginal_LK = {rule: marginal_costs(measured, architecture, rule) for rule in rules(architecture)}
    lexi_LK = lexi.sensitivities(params, execution, seed)
    budgets = []
    for budget, total in zip(config.budgets, totals):
        found = search(measured, marginal_LK, total)
        linear = schedule_rivals.linear_schedules(screening, measured, architecture, total, config.rivals)
        by_lexi = schedule_rivals.better(measured, architecture, spec_of(schedules.cheapest(lexi_LK, total)))
        uniform = None
        if budget == round(budget) <= min(architecture.k_L):
            uniform = schedule_rivals.better(measured, architecture, f"topk:{round(budget)}")
        budgets.append(BudgetResult(budget, found, linear, by_lexi, uniform))
    own_LK = marginal_LK[""]
    screened = [budget.linear.screened for budget in budgets]
    return Searched(
        budgets,
        schedule_rivals.judge(budgets, scored("held_out", windows.tokens_JT), windows),
        marginal_LK,
        lexi_LK,
        agreement(lexi_LK, own_LK, screened),
        ranks_of_schedules(own_LK, screened),
        measured.count,
    )
