"""Settings of pruning: how experts are ranked, how many are kept, and the text on which they are measured."""

import dataclasses

from moe_jax.config.checks import require, require_positive

RANDOM = "random"
BY_PLACE = ("odd", "even", "first_half", "last_half")  # they keep half of the experts
MEASURED = ("count", "soft_count", "reap", "output_aware")
METHODS = (RANDOM, *BY_PLACE, *MEASURED)


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Which experts to remove; the calibration text is that of `text.sources`. See docs/pruning.md."""

    methods: tuple[str, ...] = METHODS  # that keep the same number in every layer
    across_layers: tuple[str, ...] = ("reap",)  # that also rank the experts of all layers together, for one budget
    keep: tuple[int, ...] = (48, 32, 16)  # experts per MoE layer; across layers: on average
    draws: int = 5  # of random experts, for each number kept
    tokens: int = 65_536  # of calibration text
    sequence_length: int = 256  # tokens of each document, from its start
    export: tuple[str, ...] = ()  # models to write, such as "reap_32"; the names are those of the table

    def __post_init__(self):
        for field, known in (("methods", METHODS), ("across_layers", MEASURED)):
            given = getattr(self, field)
            unknown = [name for name in given if name not in known]
            require(not unknown, f"prune.{field}", given, f"some of {', '.join(known)}")
            require(len({*given}) == len(given), f"prune.{field}", given, "each once")
        require(len(self.methods + self.across_layers) > 0, "prune.methods", self.methods, "at least one method")
        given = self.keep
        require(len(given) > 0 and min(given) > 0, "prune.keep", given, "positive numbers")
        require(len({*given}) == len(given), "prune.keep", given, "each number once")
        require_positive("prune", self, "draws", "tokens", "sequence_length")
        require(len({*self.export}) == len(self.export), "prune.export", self.export, "each model once")
