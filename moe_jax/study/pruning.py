"""Which experts of a model to keep: every method gives each expert a score, and the best of a layer or model stay."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.config.pruning import BY_PLACE, RANDOM, PruneConfig
from moe_jax.study.expert_statistics import ExpertStatistics

Kept = Sequence[np.ndarray]  # for each MoE layer, its kept experts in ascending order


class PruningChoice(NamedTuple):
    """One model to make: how its experts are ranked, and how many stay."""

    method: str
    keep: int  # experts per MoE layer; across layers: on average
    across_layers: bool = False
    draw: int = 0  # of a random choice

    @property
    def group(self) -> str:
        """The name, without the number of a draw."""
        return f"{self.method}{'_across_layers' if self.across_layers else ''}_{self.keep}"

    @property
    def name(self) -> str:
        """The name of its row and folder."""
        return f"{self.group}_{self.draw}" if self.method == RANDOM else self.group


def _reap(statistics: ExpertStatistics) -> np.ndarray:
    """Mean of weight x norm over the tokens that chose the expert (arXiv 2510.13999, section 4); 0 without tokens."""
    return statistics.weighted_norm_LE / np.maximum(statistics.count_LE, 1)


BY_STATISTICS: dict[str, Callable[[ExpertStatistics], np.ndarray]] = {
    "count": lambda statistics: statistics.count_LE,
    "soft_count": lambda statistics: statistics.weight_LE,
    "reap": _reap,
    "output_aware": lambda statistics: statistics.contribution_LE,  # arXiv 2504.06792, section 4
}
BY_INDEX: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "odd": lambda index: index % 2,
    "even": lambda index: 1 - index % 2,
    "first_half": lambda index: -index,
    "last_half": lambda index: index,
}


def choices(config: PruneConfig, architecture: Architecture) -> list[PruningChoice]:
    """All models of a run, by number of experts.

    Raises:
        ValueError: a number of experts is one that the model cannot have, a method keeps half of the experts and this
            number is missing, or `export` names no model of the run.
    """
    _require_possible(config, architecture)
    found = []
    for keep in config.keep:
        for method in config.methods:
            if method in BY_PLACE and 2 * keep != architecture.moe.num_experts:
                continue
            found += [PruningChoice(method, keep, draw=draw) for draw in range(config.draws if method == RANDOM else 1)]
        found += [PruningChoice(method, keep, across_layers=True) for method in config.across_layers]
    names = [choice.name for choice in found]
    if unknown := [name for name in config.export if name not in names]:
        raise ValueError(f"prune.export = {unknown[0]!r}: expected one of {', '.join(names)}")
    return found


def _require_possible(config: PruneConfig, architecture: Architecture) -> None:
    moe, fewest = architecture.moe, min(architecture.num_experts_L)
    for keep in config.keep:
        given = f"prune.keep = {keep}: expected"
        if keep > fewest:
            raise ValueError(f"{given} at most the {fewest} experts of a MoE layer of this model")
        if keep % moe.num_groups:
            raise ValueError(
                f"{given} a multiple of moe.num_groups = {moe.num_groups}, which keep as many experts each"
            )
        reachable = keep // moe.num_groups * moe.num_groups_kept
        if config.methods and reachable < moe.k:
            among = f", of which a token reaches {reachable}: {moe.num_groups_kept} of {moe.num_groups} groups"
            raise ValueError(f"{given} room for the model's k = {moe.k}{among if moe.num_groups > 1 else ''}")
        if config.across_layers and keep * len(architecture.k_L) < sum(architecture.k_L):
            raise ValueError(f"{given} at least the model's k = {moe.k}, the mean over its layers")
    if config.across_layers and moe.num_groups > 1:
        raise ValueError(
            f"prune.across_layers = {config.across_layers}: expected (), since a model with moe.num_groups = "
            f"{moe.num_groups} has the same number of experts in every layer"
        )
    halves = [method for method in config.methods if method in BY_PLACE]
    if halves and (len({*architecture.num_experts_L}) > 1 or moe.num_experts / 2 not in config.keep):
        raise ValueError(
            f"prune.methods has {halves[0]!r}, which keeps half of the experts: expected {moe.num_experts / 2:g} in "
            f"prune.keep = {config.keep}, and as many experts in every layer"
        )


def kept(choice: PruningChoice, architecture: Architecture, statistics: ExpertStatistics | None, seed: int) -> Kept:
    """The experts that stay, best scores first chosen; of equal scores the lower index wins.

    With one number for all layers, every group of a layer keeps as many experts. Across layers, each layer keeps its k
    best, and the others compete with their scores over their layer's mean, since outputs grow with depth.

    Args:
        choice: one of `choices`.
        architecture: of the model.
        statistics: for a method that needs them.
        seed: of random choices; each draw has its own.
    """
    experts_L = architecture.num_experts_L
    if choice.method in BY_STATISTICS:
        score_LE = BY_STATISTICS[choice.method](statistics)
        scores = [score_E[:experts] for score_E, experts in zip(score_LE, experts_L, strict=True)]
    elif choice.method in BY_INDEX:
        scores = [BY_INDEX[choice.method](np.arange(experts)) for experts in experts_L]
    else:
        random = np.random.default_rng((seed, choice.draw, choice.keep))
        scores = [random.random(experts) for experts in experts_L]
    if choice.across_layers:
        return best_across(scores, choice.keep * len(scores), architecture.k_L)
    return [best(score_E, choice.keep, architecture.moe.num_groups) for score_E in scores]


def best(score_E: np.ndarray, count: int, num_groups: int = 1) -> np.ndarray:
    """The `count` experts with the best scores, as many of each group, in ascending order."""
    score_RE = score_E.reshape(num_groups, -1)
    order_RE = np.argsort(-score_RE, axis=1, kind="stable")[:, : count // num_groups]
    return np.sort((order_RE + np.arange(num_groups)[:, None] * score_RE.shape[1]).reshape(-1))


def best_across(scores: Sequence[np.ndarray], total: int, least_L: Sequence[int]) -> Kept:
    """`total` experts of all layers: each layer's `least` best, then those with the best scores over the mean."""
    relative = [score_E / score_E.mean() for score_E in scores]
    orders = [np.argsort(-score_E, kind="stable") for score_E in relative]
    taken = [list(order_E[:least]) for order_E, least in zip(orders, least_L, strict=True)]
    others = [
        (-relative[layer][expert], layer, expert)
        for layer, (order_E, least) in enumerate(zip(orders, least_L, strict=True))
        for expert in order_E[least:]
    ]
    for _, layer, expert in sorted(others)[: total - sum(least_L)]:
        taken[layer].append(expert)
    return [np.sort(np.array(experts)) for experts in taken]
