"""moe_jax, through the programs that its engine runs."""

import functools
import os
import resource
import time

import numpy as np


class System:
    """As `systems` says.

    Args:
        folder: the checkpoint's folder.
        threads: those of the machine.
        compiler: whether there is one for C++; otherwise all is plain JAX.
        keep_compiled: whether programs of an earlier run may be used.
    """

    def __init__(self, folder: str, threads: int, compiler: bool = True, keep_compiled: bool = True):
        assert threads == os.cpu_count(), "XLA takes every core"
        if not compiler:
            os.environ.pop("CXX", None)
            os.environ["PATH"] = ""
        import moe_jax
        from moe_jax import command
        from moe_jax.config.schema import SamplingConfig
        from moe_jax.engine.request import execution_of
        from moe_jax.model.dtypes import dtype_of, eight_bits_of, expert_itemsize, experts_dtype
        from moe_jax.study import speed

        if keep_compiled:
            command.configure_jax()
        self._speed = speed
        self._model = moe_jax.load(folder)
        params = self._model.params
        dtypes = {"dtype": experts_dtype(params), "expert_dtype": eight_bits_of(params)}
        self._execution = execution_of(self._model.architecture, **dtypes)
        self._timed = speed.TimedModel(self._model.engine, self._execution, "model", SamplingConfig())
        self._cases = {}
        self._dtype = dtype_of(params)
        self._itemsizes = {"itemsize": self._dtype.itemsize, "expert_itemsize": expert_itemsize(params)}

    @functools.cached_property
    def _probe(self):
        from moe_jax.cost import hardware

        return hardware.Probe(self._dtype)

    def logits(self, tokens_T: np.ndarray) -> np.ndarray:
        return self._model.logits(tokens_T[None])[0, -1]

    def whole(self, tokens_T: np.ndarray) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        [logits_TV] = self._model.logits(tokens_T[None])
        return time.perf_counter() - began, logits_TV[:: len(tokens_T) // 64].copy()

    def peak_memory_bytes(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def prefill(self, tokens_T: np.ndarray) -> float:
        if len(tokens_T) not in self._cases:
            self._cases[len(tokens_T)] = self._speed.Prefill(self._timed, tokens_T)
            self._cases[len(tokens_T)].take(1)
        return self._cases[len(tokens_T)].take(1)[0].seconds

    def decode(self, tokens_BT: np.ndarray, prompt: int, steps: int) -> list[float]:
        return [sample.seconds for sample in self._steps(tokens_BT, prompt, steps)]

    def _steps(self, tokens_BT, prompt, steps):
        key = "decode", len(tokens_BT)
        if key not in self._cases:
            self._cases[key] = self._speed.Decode(self._timed, tokens_BT, prompt)
        samples = []
        while len(samples) < steps:
            samples += self._cases[key].take(steps - len(samples))
        return samples

    def floor_ms(self, tokens_BT: np.ndarray, prompt: int) -> float:
        """What this machine needs at the least for a decode step of these rows, measured now."""
        from moe_jax.cost import roofline

        [sample] = self._steps(tokens_BT, prompt, 1)
        work = roofline.work(self._execution.architecture, sample.step, **self._itemsizes)
        return 1e3 * roofline.floor_s(work, self._probe.measure())
