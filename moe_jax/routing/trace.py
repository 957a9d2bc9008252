"""Recorded routing of a trained model, replayed in a model with random weights.

Random routers spread tokens evenly, and independently of the previous token; trained ones prefer some experts and often
choose the same ones again. The cost of a decode step depends on the distinct experts of its batch, so a benchmark with
random weights replays recorded routing (`assets/traces/`).
"""

import dataclasses
import os

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trace:
    """The experts that a trained model chose for the tokens of several documents.

    Attributes:
        expert_LJTK: uint8 or wider, for T consecutive tokens of J documents; a token's experts are best first.
        num_experts: E of the recorded model.
    """

    expert_LJTK: np.ndarray
    num_experts: int

    def require(self, num_experts: int, k_max: int) -> None:
        """Refuses a model in which the trace cannot be replayed; see `replay`.

        Raises:
            ValueError: the model has too many experts or slots, or no multiple of the recorded number of experts.
        """
        recorded_layers, recorded_k = self.expert_LJTK.shape[0], self.expert_LJTK.shape[3]
        largest = recorded_layers * self.num_experts
        if num_experts % self.num_experts or num_experts > largest:
            raise ValueError(
                f"moe.num_experts = {num_experts}: expected a multiple of the {self.num_experts} experts of a recorded "
                f'trace, at most {largest}; or benchmark.trace = "", for the random routers\' own choice'
            )
        largest = recorded_k * num_experts // self.num_experts
        if k_max > largest:
            raise ValueError(f"{k_max} slots per token: expected at most the {largest} of the recorded trace")

    def replay(self, num_layers: int, num_experts: int, k_max: int, rows: int, length: int) -> np.ndarray:
        """Turns the trace into the routing of another model, for rows that read different texts.

        The documents form a ring, end to end, on which the rows start evenly spaced: up to J rows begin in documents of
        their own, and no two rows are ever at the same token. This preserves how unevenly experts are used, how often
        consecutive tokens share experts, and how far texts differ.

        If the model has P times the recorded experts, a token takes its slots from P recorded layers in turn, and each
        of these layers has its own range of experts. Within a range, skew and reuse are as recorded; between ranges,
        choices are correlated as those of the recorded layers. With fewer slots than recorded, the best are taken. The
        recorded layers repeat cyclically.

        Args:
            num_layers: MoE layers of the model.
            num_experts: E of the model.
            k_max: K, slots per token.
            rows: B.
            length: T, tokens of each row.

        Returns:
            expert_LBTK int32; the experts of a token are distinct.

        Raises:
            ValueError: as `require`.
        """
        self.require(num_experts, k_max)
        recorded_layers, documents, tokens, recorded_k = self.expert_LJTK.shape
        ring = documents * tokens
        place_BT = (np.arange(rows)[:, None] * ring // rows + np.arange(length)[None, :]) % ring
        stream_LNK = self.expert_LJTK.reshape(recorded_layers, ring, recorded_k)
        parts = num_experts // self.num_experts
        expert_LBTK = np.empty((num_layers, rows, length, k_max), np.int32)
        for layer in range(num_layers):
            for slot in range(k_max):
                part, rank = slot % parts, slot // parts
                recorded = stream_LNK[(layer * parts + part) % recorded_layers, :, rank]
                expert_LBTK[layer, :, :, slot] = recorded[place_BT].astype(np.int32) + part * self.num_experts
        return expert_LBTK


def read(path: str | os.PathLike) -> Trace:
    """Reads a trace written by `save`.

    Raises:
        ValueError: there is no such file, or it is not a trace.
    """
    try:
        with np.load(path) as arrays:
            trace = Trace(arrays["expert_LJTK"], int(arrays["num_experts"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"benchmark.trace = {os.fspath(path)!r}: no trace ({error}); expected an .npz of one"
        ) from error
    if trace.expert_LJTK.ndim != 4 or not trace.expert_LJTK.size or trace.expert_LJTK.max() >= trace.num_experts:
        raise ValueError(f"benchmark.trace = {os.fspath(path)!r}: expected expert_LJTK below num_experts")
    return trace


def save(path: str | os.PathLike, trace: Trace) -> None:
    """Writes a trace, compressed."""
    np.savez_compressed(path, expert_LJTK=trace.expert_LJTK, num_experts=trace.num_experts)
