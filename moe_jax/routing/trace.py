"""Recorded routing of a trained model, replayed in a model whose weights are random.

Random routers spread tokens evenly and forget the last token; trained ones prefer some experts and stay with them. What
a decode step costs is set by the distinct experts of its batch, so a benchmark of random weights takes its routing from
a recording (`assets/traces/`).
"""

import dataclasses
import os

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trace:
    """Which experts a trained model chose for the tokens of several documents.

    Attributes:
        expert_LJTK: uint8 or wider, T consecutive tokens of each of J documents; the experts of a token best first.
        num_experts: E of the recorded model.
    """

    expert_LJTK: np.ndarray
    num_experts: int

    def require(self, num_experts: int, k_max: int) -> None:
        """Refuses a model that the trace cannot be replayed in; see `replay` for why.

        Raises:
            ValueError: saying what it can be replayed in.
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
        """The trace as the routing of another model, for rows that read different texts.

        The documents lie end to end in a ring, on which the rows start evenly spaced: up to J rows, each in a document
        of its own, and at any step no two at one token. What is kept of the recorded routing is how unevenly experts
        are used, how often a text's next token returns to its experts, and how far texts differ.

        A token of a model with P times the recorded experts takes the slots of P recorded layers in turn, the experts
        of each in a range of their own: within each range the recorded skew and reuse, between the ranges the
        dependence of one layer's choice on another's. Fewer slots per token are the first, which are the best; layers
        repeat cyclically.

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


def load(path: str | os.PathLike) -> Trace:
    """Reads a trace as `save` wrote it.

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
