"""A schedule search as figures, rows of result.json, tables and CSV."""

from typing import Any

import numpy as np

from moe_jax.report.figures import Row, csv_text, figure, markdown
from moe_jax.study.schedule_rivals import LEXI, LINEAR, ORACLE, PLAIN, SEARCHED, UNIFORM, JudgedPolicy
from moe_jax.study.schedule_study import Searched


def figures(searched: Searched) -> dict[str, dict[str, Any]]:
    """Rank agreements and the number of measurements."""
    found = {"measured_schedules": {"value": searched.measured, "unit": "schedules"}}
    lexi = searched.lexi_agreement
    found["lexi_rank_of_layers_and_k"] = {"value": lexi.layers_and_k, "unit": "1"}
    found["lexi_rank_across_layers"] = {"value": lexi.across_layers, "unit": "1"}
    for name, ranks in (("lexi", lexi.schedules_of_budgets), ("marginal", searched.marginal_ranks)):
        for budget, value in zip(searched.budgets, ranks):
            found[f"{name}_rank_of_schedules_{budget.budget:g}"] = {"value": value, "unit": "1"}
    return found


def rows(searched: Searched) -> list[Row]:
    """A row for each budget and role, then one for each schedule found under a rule."""
    found = []
    for budget, judged in zip(searched.budgets, searched.judged):
        for one in judged:
            own = {
                "calibration_kl": {"value": one.cost, "unit": "nat/token"},
                "bits_per_byte": figure(one.bits_per_byte, "bit/byte"),
                "bits_per_byte_increase": figure(one.increase, "1"),
                "kl_to_full": figure(one.kl, "nat/token"),
            }
            if one.searched:
                own["searched_over_this"] = figure(one.searched, "1")
            found.append({"policy": one.spec, "budget": budget.budget, "role": one.role, "figures": own})
        for one in budget.found:
            own = {
                "calibration_kl": {"value": one.cost, "unit": "nat/token"},
                "sum_of_marginal_kl": {"value": one.predicted, "unit": "nat/token"},
                "start_calibration_kl": {"value": one.start_cost, "unit": "nat/token"},
            }
            found.append({"policy": one.spec, "budget": budget.budget, "role": "found", "figures": own})
    return found


def table(searched: Searched, subject: str) -> str:
    """For people: what was found, what it loses, and how it compares; `subject` is model and texts, in words."""
    heads = {
        LINEAR: "best (b,h,e,p) on calibration text",
        ORACLE: "best (b,h,e,p) on held-out text",
        PLAIN: "best (b,h,e,p), own weights",
        LEXI: "LExI",
        UNIFORM: "uniform",
    }
    lines = []
    for budget, judged in zip(searched.budgets, searched.judged):
        by_role = {one.role: one for one in judged}
        own = by_role[SEARCHED]
        value, (low, high) = own.bits_per_byte
        lines.append(
            [
                f"{budget.budget:g}",
                f"`{own.spec}`",
                f"{own.cost:.4f}",
                f"{value:.4f} ({low:.4f} to {high:.4f})",
                f"{own.kl.value:.4f}",
                *(_compared(by_role.get(role)) for role in heads),
            ]
        )
    head = ["mean k", "searched", "KL, calibration", "bits per byte, held out", "KL, held out", *heads.values()]
    counted = ", ".join(f"{len(budget.linear.schedule_of)} of {budget.budget:g}" for budget in searched.budgets)
    specs = ", ".join(f'"{spec}"' for spec in ("model", *searched.policies))
    return "\n\n".join(
        [
            f"{subject}\n{searched.measured} schedules were measured on all calibration text; "
            f"different (b,h,e,p) schedules: {counted}.",
            "After each other schedule: the bits that the searched one needs over its bits, paired by document.",
            markdown(head, lines),
            "Spearman's correlation with measured divergence, the model's own weights:",
            _ranks_table(searched),
            f"--set 'sweep.policies=({specs},)'",
        ]
    )


def costs_csv(searched: Searched) -> str:
    """Marginal costs under each rule, and LExI's, of every layer and k."""
    marginal = searched.marginal_LK
    lines = [
        [layer, k, *(f"{cost_LK[layer, k - 1]:.8g}" for cost_LK in (*marginal.values(), searched.lexi_LK))]
        for layer, k in np.ndindex(*searched.lexi_LK.shape)
        for k in [k + 1]
        if np.isfinite(searched.lexi_LK[layer, k - 1])
    ]
    return csv_text(["moe_layer", "k", *(f"kl{rule}" for rule in marginal), "lexi"], lines)


def _compared(one: JudgedPolicy | None) -> str:
    if one is None:
        return "none"
    value, (low, high) = one.searched
    percent = [f"{100 * number:+.2f}" for number in (value, low, high)]
    return f"`{one.spec}` {percent[0]}% ({percent[1]} to {percent[2]})"


def _ranks_table(searched: Searched) -> str:
    head = ["", "layers and k", "layers at one k", *(f"(b,h,e,p) of {one.budget:g}" for one in searched.budgets)]
    lexi, marginal = searched.lexi_agreement, searched.marginal_ranks
    proxy = [f"{value:.2f}" for value in (lexi.layers_and_k, lexi.across_layers, *lexi.schedules_of_budgets)]
    sums = [f"{value:.2f}" for value in marginal]
    return markdown(head, [["LExI's proxy", *proxy], ["sums of measured marginal costs", "", "", *sums]])
