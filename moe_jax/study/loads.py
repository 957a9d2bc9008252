"""Times decode steps at a given number of rows under several policies, each with its own recorded routing.

Every step is taken at the same position and overwrites the same entries of the cache. The contents of the cache do not
affect the time.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np

from moe_jax.config.schema import SamplingConfig
from moe_jax.cost import roofline
from moe_jax.engine import cache as caches
from moe_jax.engine.batch import pad_prompts
from moe_jax.engine.generate import Engine
from moe_jax.engine.request import make_requests
from moe_jax.engine.steps import CacheSlots
from moe_jax.model.decoder import Execution, dtype_of
from moe_jax.model.finite import require_finite
from moe_jax.routing import policies
from moe_jax.routing.selection import distinct_experts


class Load:
    """A number of rows, each with the same number of tokens in the cache.

    Args:
        engine: weights and programs.
        execution: the static settings of the step.
        rows: the batch size B.
        cached: tokens of each row in the cache.

    Raises:
        ValueError: the cache does not fit in the memory that is available.
    """

    def __init__(self, engine: Engine, execution: Execution, rows: int, cached: int):
        self.rows, self.cached = rows, cached
        self._engine, self._execution = engine, execution
        sampling = SamplingConfig(max_new_tokens=2)
        self._batch = pad_prompts(make_requests([[0] * cached] * rows, None, execution, sampling=sampling), execution)
        dtype, shape = dtype_of(engine.params), self._batch.shape
        caches.require_memory(execution.architecture, [(shape.batch, shape.memory)], dtype)
        self._slots = engine.empty(shape.batch, shape.memory, execution)
        self._settings: dict[policies.Policy, policies.Settings] = {}
        self._warm: set[jax.stages.Compiled] = set()

    def step(self, policy: policies.Policy, chosen_LBK: np.ndarray) -> float:
        """Times one step in which the rows take these experts; -1: none. Returns seconds.

        The router and the policy run too, but their choice is not used.
        """
        batch, execution = self._batch, self._execution
        padded = np.full((len(chosen_LBK), batch.shape.batch, execution.k_max), -1, np.int32)
        padded[:, : self.rows, : chosen_LBK.shape[2]] = chosen_LBK
        replayed = policies.Replayed(self._settings_of(policy), *jax.device_put((np.maximum(padded, 0), padded >= 0)))
        live = batch.live._replace(policy=replayed)
        program = self._engine.decode_program(self._slots, live, execution)
        alive_B = batch.length_B > 0
        for _ in range(1 if program in self._warm else 2):
            self._warm.add(program)
            at = (np.zeros_like(batch.length_B), np.full_like(batch.length_B, self.cached), alive_B.astype(np.int32))
            slots = jax.block_until_ready(jax.device_put(CacheSlots(self._slots.cache, *at)))
            began = time.perf_counter()
            taken, self._slots = program(self._engine.params, slots, alive_B, np.int32(1), self._engine.end_I, live)
            taken = jax.device_get(taken)
            seconds = time.perf_counter() - began
            named = f"a step of {self.rows} rows, {policy.spec!r}"
            require_finite(taken.log_probability_SB[0, : self.rows], named, self._engine.params)
        return seconds

    def work(self, chosen_LBK: np.ndarray, itemsize: int) -> roofline.Work:
        """The least work of a step with this routing, for its roofline time."""
        kept, distinct = int(np.count_nonzero(chosen_LBK >= 0)), int(distinct_experts(chosen_LBK).sum())
        step = roofline.Step([self.cached] * self.rows, [1] * self.rows, kept, distinct)
        return roofline.work(self._execution.architecture, step, itemsize)

    def _settings_of(self, policy: policies.Policy) -> policies.Settings:
        if policy not in self._settings:
            rows, execution = self._batch.shape.batch, self._execution
            self._settings[policy] = policies.settings([policy] * rows, execution.architecture, execution.k_max)
        return self._settings[policy]


def in_turn(load: Load, turns: Sequence[tuple[policies.Policy, np.ndarray]]) -> np.ndarray:
    """Takes the steps chosen_SLBK under each policy in turn; returns seconds_PS."""
    return np.array([[load.step(policy, chosen_LBK) for chosen_LBK in chosen_SLBK] for policy, chosen_SLBK in turns])
