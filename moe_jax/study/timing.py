"""Summarises timed steps: medians next to the least time that the machine needs for them."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from moe_jax.cost import roofline
from moe_jax.model.execution import Execution
from moe_jax.study.speed import Case, Sample


@dataclasses.dataclass(frozen=True)
class Timing:
    """The timing of a case over all its samples.

    Attributes:
        case: its name, such as "decode_8".
        tokens: read by one step.
        quartiles_ms: first quartile, median and third quartile of the time of a step.
        bytes: the least that a step must move, median over the steps.
        flops: of a step, median over the steps.
        floor_ms: the roofline time of a step, median over the steps.
        distinct_experts: of one MoE layer in one step, mean.
        independent_experts: the mean to expect if each token chose as many experts uniformly and independently.
    """

    case: str
    tokens: int
    quartiles_ms: tuple[float, float, float]
    bytes: float
    flops: float
    floor_ms: float
    distinct_experts: float
    independent_experts: float

    @property
    def over_floor(self) -> float:
        """The median time over the floor."""
        return self.quartiles_ms[1] / self.floor_ms

    @property
    def tokens_per_s(self) -> float:
        """Tokens read per second at the median time."""
        return 1e3 * self.tokens / self.quartiles_ms[1]


def timing_of(
    case: Case,
    samples: Sequence[Sample],
    execution: Execution,
    machine: roofline.Machine,
    itemsize: int,
    expert_itemsize: float | None = None,
) -> Timing:
    """Summarises the samples of a case, with their roofline times; itemsizes are as `roofline.work` takes them."""
    architecture = execution.architecture
    layers = architecture.decoder.num_moe_layers
    itemsizes = {"itemsize": itemsize, "expert_itemsize": expert_itemsize}
    works = [roofline.work(architecture, sample.step, **itemsizes) for sample in samples]
    kept = statistics.mean(sample.step.kept_slots for sample in samples) / (layers * case.tokens)
    return Timing(
        case.name,
        case.tokens,
        tuple(1e3 * np.percentile([sample.seconds for sample in samples], (25, 50, 75))),
        statistics.median(work.bytes for work in works),
        statistics.median(work.flops for work in works),
        1e3 * statistics.median(roofline.floor_s(work, machine) for work in works),
        statistics.mean(sample.step.distinct_experts for sample in samples) / layers,
        statistics.mean(
            roofline.expected_distinct(experts, min(kept, experts), case.tokens)
            for experts in architecture.num_experts_L
        ),
    )
