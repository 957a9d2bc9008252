"""llama.cpp, by the C interface that llama-cpp-python wraps."""

import ctypes
import time

import numpy as np


class System:
    """As `systems` says; reads the GGUF file of the checkpoint."""

    def __init__(self, path: str, threads: int, tokens: int):
        import llama_cpp

        self._library, self._threads = llama_cpp, threads
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._tokens = tokens  # of a row, prompt and steps together
        self._whole = self._context(1)
        self._going_on = {}

    def _context(self, rows: int):
        options = self._library.llama_context_default_params()
        options.n_ctx = self._tokens * rows
        options.n_batch = options.n_ubatch = max(512, self._tokens)
        options.n_seq_max = rows
        options.n_threads = options.n_threads_batch = self._threads
        return self._library.llama_init_from_model(self._model, options)

    def _call(self, context, token_N, position_N, row_N, needs_logits_N) -> tuple[float, list[np.ndarray]]:
        """Reads tokens; returns the seconds, and logits after the tokens that need them."""
        library = self._library
        batch = library.llama_batch_init(len(token_N), 0, 1)
        batch.n_tokens = len(token_N)
        for i, (token, position, row, needs_logits) in enumerate(zip(token_N, position_N, row_N, needs_logits_N)):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), int(position), bool(needs_logits)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, int(row)
        began = time.perf_counter()
        status = library.llama_decode(context, batch)
        logits = [
            np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (self._vocab_size,))
            for i in np.flatnonzero(needs_logits_N).tolist()
        ]
        seconds = time.perf_counter() - began
        library.llama_batch_free(batch)
        if status:
            raise ValueError(f"llama_decode: {status}")
        return seconds, logits

    def _read(self, tokens_T):
        self._library.llama_memory_clear(self._library.llama_get_memory(self._whole), True)
        length = len(tokens_T)
        return self._call(self._whole, tokens_T, range(length), [0] * length, [0] * (length - 1) + [1])

    def logits(self, tokens_T: np.ndarray) -> np.ndarray:
        return self._read(tokens_T)[1][0].copy()

    def prefill(self, tokens_T: np.ndarray) -> float:
        return self._read(tokens_T)[0]

    def decode(self, tokens_BT: np.ndarray, prompt: int, steps: int) -> list[float]:
        rows = len(tokens_BT)
        if rows not in self._going_on:
            context = self._context(rows)
            for row in range(rows):
                read = range(prompt), [row] * prompt, [0] * (prompt - 1) + [1]
                self._call(context, tokens_BT[row, :prompt], *read)
            self._going_on[rows] = context, prompt
        context, place = self._going_on[rows]
        self._going_on[rows] = context, place + steps
        return [
            self._call(context, tokens_BT[:, at], [at] * rows, range(rows), [1] * rows)[0]
            for at in range(place, place + steps)
        ]
