"""Samples the number of experts in every training step, so that one model serves every k."""

import jax.numpy as jnp
import numpy as np

from moe_jax.config.architecture import Architecture
from moe_jax.config.finetuning import FinetuneConfig
from moe_jax.routing import policies
from moe_jax.routing.policies import Settings
from moe_jax.routing.policies.parse import MODEL_OWN


class KSampler:
    """Random numbers of experts for each step, row and layer, from `k_min` to the model's own k.

    Matryoshka MoE (arXiv 2509.26520) samples one per layer, which did better there than one for all layers. The numbers
    of a step depend on the seed and the step number only.

    Raises:
        ValueError: `k_min` is above the model's own k, or the number of weights is not the number of values of k.
    """

    def __init__(self, config: FinetuneConfig, architecture: Architecture, rows: int, seed: int):
        most = architecture.moe.k
        if config.k_min > most:
            raise ValueError(f"finetune.k_min = {config.k_min}: expected at most the model's own {most} experts")
        self._numbers = np.arange(config.k_min, most + 1)
        weights = np.array(config.k_weights or np.ones(len(self._numbers)))
        if len(weights) != len(self._numbers):
            raise ValueError(
                f"finetune.k_weights has {len(weights)} numbers: expected {len(self._numbers)}, one for each k from "
                f"finetune.k_min = {config.k_min} to the model's own {most}"
            )
        self._shares = weights / weights.sum()
        layers = architecture.decoder.num_moe_layers
        self._sampled_shape = {"step": (1, 1), "row": (rows, 1), "layer": (rows, layers)}[config.k_drawn_per]
        self._shape, self._seed = (rows, layers), seed
        self._own = policies.settings([MODEL_OWN] * rows, architecture, most)

    def live(self, step: int) -> Settings:
        """The policy settings of a step."""
        random = np.random.default_rng((self._seed, step))
        k_BL = np.broadcast_to(random.choice(self._numbers, self._sampled_shape, p=self._shares), self._shape)
        return self._own._replace(columns_BL=self._own.columns_BL | {"k": jnp.asarray(k_BL, jnp.int32)})
