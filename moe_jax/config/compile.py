"""Settings of compiling for devices that are not there: which devices, which step, and its size."""

import dataclasses

from moe_jax.config.checks import require, require_one_of, require_positive

PHASES = ("decode", "prefill", "finetune")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """A step of the configured model on devices that are not there.

    A decode step adds a token to each of `rows` requests whose caches have `positions`; a prefill reads `prompt` tokens
    of each. A fine-tuning step reads training.batch_size rows, and more with training.accumulation.
    """

    topology: str = "cpu:1"  # a slice of TPUs, as v5p:4x4x8; a node of GPUs, as h100:8; devices of a CPU, as cpu:8
    phase: str = "decode"  # or "prefill" or "finetune"
    rows: int = 8
    positions: int = 4096
    prompt: int = 2048
    k: tuple[int, ...] = ()  # active experts to count times for; (): the model's own, and fewer: 6, 4, 2
    batches: tuple[int, ...] = (1, 8, 64, 256)  # rows to count times for, beside `rows`

    def __post_init__(self):
        require_one_of("compile", self, "phase", PHASES)
        require_positive("compile", self, "rows", "positions", "prompt")
        for field in ("k", "batches"):
            given = getattr(self, field)
            require(all(one > 0 for one in given), f"compile.{field}", given, "positive numbers")
            require(len(set(given)) == len(given), f"compile.{field}", given, "each number once")
