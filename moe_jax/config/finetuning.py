"""Settings of fine-tuning: what is minimised, what trains, and under which number of experts."""

import dataclasses
import math

from moe_jax.config.checks import require, require_fraction, require_one_of, require_positive

DIRECTIONS = ("forward", "reverse")
TRAINED = ("all", "router", "router_and_norms", "lora")
DRAWN_PER = ("step", "row", "layer")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The terms of the loss and their weights; the load loss has its weight in `training.balance_loss`."""

    language_model: float = 1.0  # cross-entropy of the next token
    distillation: float = 0.0  # KL divergence between the full model, frozen, and the one that trains
    direction: str = "forward"  # "forward": KL(full model || trained one); "reverse": KL(trained one || full model)
    temperature: float = 1.0  # that both are divided by
    hidden: float = 0.0  # squared distance of what the output heads read, relative to the full model's
    sparsity: float = 0.0  # times the effective number of experts of a token, see `balance.effective_experts`

    def __post_init__(self):
        require_one_of("objective", self, "direction", DIRECTIONS)
        require_positive("objective", self, "temperature")
        for field in ("language_model", "distillation", "hidden", "sparsity"):
            value = getattr(self, field)
            require(value >= 0 and math.isfinite(value), f"objective.{field}", value, "0 or more")
        weights = self.language_model + self.distillation + self.hidden
        require(weights > 0, "objective.language_model", self.language_model, "above 0, or distillation or hidden so")

    @property
    def has_teacher(self) -> bool:
        """Whether a term compares with the full model."""
        return self.distillation > 0 or self.hidden > 0


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What trains, and with how many experts; `policy.spec` is the setting that is to be recovered."""

    train: str = "all"  # which weights: one of "all", "router", "router_and_norms", "lora"
    lora_rank: int = 8  # of every expert's matrices, and of attention's
    lora_alpha: float = 16.0  # the product counts lora_alpha / lora_rank times
    mask: bool = False  # train a mask of experts too; objective.sparsity says what an expert has to be worth
    elastic: bool = False  # draw k anew in every step, instead of policy.spec, for one model that serves every k
    k_min: int = 1  # the least that is drawn; the most is the model's own k
    k_weights: tuple[float, ...] = ()  # of each k from k_min on; (): all alike
    k_drawn_per: str = "layer"  # "step": one for all; "row": one for each sequence; "layer": for each of both
    rollouts: int = 0  # texts that the full model writes, to be trained on instead of text.sources; 0: none
    patience: int = 0  # evaluations without a better one after which training ends; 0: it goes on to the last step
    held_out_fraction: float = 0.05  # of the documents, where text.held_out is ""

    def __post_init__(self):
        require_one_of("finetune", self, "train", TRAINED)
        require_one_of("finetune", self, "k_drawn_per", DRAWN_PER)
        require_positive("finetune", self, "lora_rank", "lora_alpha", "k_min")
        require_fraction("finetune", self, "held_out_fraction")
        for field in ("patience", "rollouts"):
            require(getattr(self, field) >= 0, f"finetune.{field}", getattr(self, field), "0 or more")
        weights = self.k_weights
        good = all(math.isfinite(weight) and weight >= 0 for weight in weights) and (not weights or sum(weights) > 0)
        require(good, "finetune.k_weights", weights, "numbers of 0 or more, not all of them 0")
