"""transformers on torch, with each of its implementations of experts."""

import resource
import time

import numpy as np

_FEW_ROWS = "batched_mm"  # copies the weights of every slot: a prompt would take tens of gigabytes


class System:
    """As `systems` says."""

    def __init__(self, folder: str, threads: int, dtype: str, experts: str):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation=experts
        ).eval()
        self._experts = experts
        self._going_on = {}

    def _call(self, tokens_BT: np.ndarray, **options) -> tuple:
        tokens = self._torch.tensor(np.asarray(tokens_BT, np.int64))
        began = time.perf_counter()
        out = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1, **options)
        out.logits[:, -1].argmax(dim=1).numpy()
        return time.perf_counter() - began, out

    def _read(self, tokens_BT):
        if self._experts == _FEW_ROWS:
            self._model.set_experts_implementation("grouped_mm")
        _, out = self._call(tokens_BT)
        self._model.set_experts_implementation(self._experts)
        return out

    def logits(self, tokens_T: np.ndarray) -> np.ndarray:
        return self._read(tokens_T[None]).logits[0, -1].float().numpy()

    def whole(self, tokens_T: np.ndarray) -> tuple[float, np.ndarray]:
        tokens = self._torch.tensor(np.asarray(tokens_T[None], np.int64))
        began = time.perf_counter()
        logits_TV = self._model(input_ids=tokens, use_cache=False).logits[0].numpy()
        return time.perf_counter() - began, logits_TV[:: len(tokens_T) // 64].copy()

    def peak_memory_bytes(self) -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def prefill(self, tokens_T: np.ndarray) -> float | None:
        return None if self._experts == _FEW_ROWS else self._call(tokens_T[None])[0]

    def decode(self, tokens_BT: np.ndarray, prompt: int, steps: int) -> list[float]:
        rows = len(tokens_BT)
        if rows not in self._going_on:
            self._going_on[rows] = self._read(tokens_BT[:, :prompt]).past_key_values, prompt
        cache, place = self._going_on[rows]
        self._going_on[rows] = cache, place + steps
        return [self._call(tokens_BT[:, at, None], past_key_values=cache)[0] for at in range(place, place + steps)]
