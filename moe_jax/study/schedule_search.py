"""Searches the best number of experts per layer for a budget, by measured divergence from the full model.

The cost of a schedule is the Kullback-Leibler divergence of the full model's next-token distributions from those under
the schedule, on calibration text, in nats per token. First the marginal costs are measured: one layer alone has k
experts, all others their own number. Dynamic programming finds the schedule of a budget with the least sum of marginal
costs. Layers do not add up exactly, so it is then refined by measuring whole schedules: one layer takes an expert from
another as long as that lowers the cost.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.evaluation.divergence import Together, score_together
from moe_jax.evaluation.journal import Journal
from moe_jax.evaluation.likelihood import TOKENS
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.routing import policies
from moe_jax.routing.policies.columns import model_facts
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.routing.policies.renormalize import Renormalize
from moe_jax.routing.policies.schedule import ModelOwn
from moe_jax.study import schedules
from moe_jax.study.schedules import KPerLayer

ROWS = 16  # policies of a compiled step, the full model among them; fewer if they are few or windows long
CLOSE = 1.1  # a rule whose schedule costs more than this, over that of another rule, is not worth refining
CONSIDERED = 4  # the most promising moves that a round of refinement may measure, times the number of MoE layers


class Policies:
    """Scores policies on windows of a text, each once; the first row of every batch is the full model.

    Args:
        params: as `decoder.split` gives them.
        tokens_JT: int32 windows: inputs, and the label of the last.
        execution: the static half of the step.
        journal: keeps every batch of policies.
        name: of the text; names the parts of the journal.
        advance: is called with the number of policies that have been scored.
    """

    def __init__(
        self,
        params: Params,
        tokens_JT: np.ndarray,
        execution: Execution,
        journal: Journal,
        name: str,
        advance: Callable[[int], object] = lambda count: None,
    ):
        self._params, self._tokens_JT, self._execution = params, tokens_JT, execution
        self._journal, self._name, self._advance = journal, name, advance
        self._rows = max(2, min(ROWS, TOKENS // (tokens_JT.shape[1] - 1)))
        self._model = model_facts(execution.architecture, None)
        self._scored: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def count(self) -> int:
        """Policies that were scored."""
        return len(self._scored)

    @property
    def tokens_of_windows(self) -> np.ndarray:
        """Labels of each window, int [J]."""
        return np.full(len(self._tokens_JT), self._tokens_JT.shape[1] - 1)

    def score(self, specs: Iterable[str]) -> Together:
        """Bits and divergences of policies on every window, in their order."""
        compared = list(map(parse, specs))
        new = list({self._key(policy): policy for policy in compared if self._key(policy) not in self._scored}.values())
        size = self._rows - 1
        for first in range(0, len(new), size):
            self._score_batch(new[first : first + size])
        nats_PJ, kl_PJ = zip(*(self._scored[self._key(policy)] for policy in compared))
        return Together(np.stack(nats_PJ, axis=1), np.stack(kl_PJ, axis=1))

    def costs(self, specs: Iterable[str]) -> np.ndarray:
        """float64 [P]: divergence from the full model in nats per token, of all windows."""
        return self.score(specs).kl_JP.sum(axis=0) / self._tokens_JT[:, 1:].size

    def _key(self, policy: policies.Policy) -> tuple:
        """The same for policies that keep the same: `topk:4` and `layers:4,4,4`."""
        neutral = ModelOwn.neutral(self._model) + Renormalize.neutral(self._model)
        columns = dict(zip(ModelOwn.sets + Renormalize.sets, neutral)) | policy.columns(self._model)
        return tuple((name, *column_L.tolist()) for name, column_L in sorted(columns.items()))

    def _score_batch(self, compared: Sequence[policies.Policy]) -> None:
        def compute():
            rows = self._rows
            while rows // 2 > len(compared):
                rows //= 2
            batch = [MODEL_OWN, *compared] + [MODEL_OWN] * (rows - 1 - len(compared))
            live = policies.settings(batch, self._execution.architecture, self._execution.k_max)
            return score_together(self._params, self._tokens_JT, live, self._execution)._asdict()

        digest = hashlib.sha256("\n".join(policy.spec for policy in compared).encode()).hexdigest()
        part = self._journal.once(f"{self._name}-{digest[:16]}", compute)
        for number, policy in enumerate(compared, 1):
            self._scored[self._key(policy)] = part["nats_JP"][:, number], part["kl_JP"][:, number]
        self._advance(len(compared))


class SearchedSchedule(NamedTuple):
    """The schedule that was found for a budget under one rule for the weights."""

    spec: str
    cost: float  # measured, nats per token
    predicted: float  # the sum of its marginal costs
    start_cost: float  # measured cost of the schedule with the least sum of marginal costs


def rules(architecture: Architecture) -> tuple[str, str]:
    """What may follow the schedule in a spec: nothing, the model's own rule for the kept weights, or another rule."""
    return "", "+renormalize:none" if architecture.moe.normalize else "+renormalize:own"


def spec_of(k_L: KPerLayer, rule: str = "") -> str:
    """The policy of a schedule."""
    return f"layers:{','.join(map(str, k_L))}{rule}"


def marginal_costs(measured: Policies, architecture: Architecture, rule: str) -> np.ndarray:
    """cost_LK: the measured cost of k experts in one layer alone, at index k - 1.

    It is 0 for a layer's own k, where every rule gives the full model, and inf for more.
    """
    own_L = architecture.k_L
    cost_LK = np.full((len(own_L), max(own_L)), np.inf)
    places = [(layer, k) for layer, own in enumerate(own_L) for k in range(1, own)]
    alone = [own_L[:layer] + (k,) + own_L[layer + 1 :] for layer, k in places]
    for (layer, k), cost in zip(places, measured.costs(spec_of(k_L, rule) for k_L in alone)):
        cost_LK[layer, k - 1] = cost
    for layer, own in enumerate(own_L):
        cost_LK[layer, own - 1] = 0.0
    return cost_LK


def search(measured: Policies, marginal_LK: Mapping[str, np.ndarray], total: int) -> list[SearchedSchedule]:
    """The best schedule of a total under each rule, the better rule first.

    It begins with the cheapest schedule by marginal costs, and is refined by `refined`, unless this one costs more than
    `CLOSE` times as much as that of the other rule.

    Args:
        measured: scores schedules on calibration text.
        marginal_LK: by rule, as `marginal_costs` gives them.
        total: experts of all layers together.
    """
    starts = {rule: schedules.cheapest(cost_LK, total) for rule, cost_LK in marginal_LK.items()}
    costs = measured.costs(spec_of(k_L, rule) for rule, k_L in starts.items())
    found = []
    for (rule, k_L), start_cost in zip(starts.items(), costs.tolist()):
        cost, cost_LK = start_cost, marginal_LK[rule]
        if start_cost <= CLOSE * costs.min():
            k_L, cost = refined(measured, cost_LK, k_L, start_cost, rule)
        found.append(SearchedSchedule(spec_of(k_L, rule), cost, schedules.sum_of(cost_LK, k_L), start_cost))
    return sorted(found, key=lambda one: one.cost)


def refined(measured: Policies, cost_LK: np.ndarray, k_L: KPerLayer, cost: float, rule: str) -> tuple[KPerLayer, float]:
    """Moves single experts from one layer to another as long as that lowers the measured cost; returns both.

    A round measures moves, the most promising by marginal costs first, one batch at a time, and takes the best of the
    first batch in which one lowers the cost. Of L layers it considers `CONSIDERED` * L moves, which are all up to L =
    5. It ends when none of these lowers the cost.
    """
    while True:
        candidates = schedules.moves(k_L, cost_LK)[: CONSIDERED * len(k_L)]
        for first in range(0, len(candidates), ROWS - 1):
            some = candidates[first : first + ROWS - 1]
            costs = measured.costs(spec_of(one, rule) for one in some)
            if costs.min() < cost:
                k_L, cost = some[int(costs.argmin())], float(costs.min())
                break
        else:
            return k_L, cost
