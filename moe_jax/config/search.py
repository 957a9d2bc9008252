"""Settings of the search for the best number of experts in each layer."""

import dataclasses

from moe_jax.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Schedules by budget: found on windows of text.sources, judged on windows of text.held_out."""

    budgets: tuple[float, ...] = (4.0,)  # experts per token, mean over MoE layers
    windows: int = 32  # of text.sources, on which divergence from the full model is measured
    context: int = 512  # tokens per window
    held_out_windows: int = 128
    rivals: int = 10  # best schedule:b,h,e,p on the windows, which are judged as well; 0: none is measured

    def __post_init__(self):
        require(len(self.budgets) > 0, "search.budgets", self.budgets, "at least one budget")
        require(len(set(self.budgets)) == len(self.budgets), "search.budgets", self.budgets, "each budget once")
        require(all(1 <= one < 2**31 for one in self.budgets), "search.budgets", self.budgets, "numbers of at least 1")
        require_positive("search", self, "windows", "context", "held_out_windows")
        require(self.rivals >= 0, "search.rivals", self.rivals, "0 (none) or more")
