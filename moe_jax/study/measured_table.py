"""Measured throughputs: a CSV file with one column per number of experts."""

import csv
import dataclasses
import os
import re
from typing import NamedTuple

import numpy as np

from moe_jax.config.architecture import Architecture

_COLUMN = re.compile(r"([ke])([1-9]\d{0,5})")
_MOST_LINES = 10_000


class MeasuredTable(NamedTuple):
    """Throughput of a closed loop, by concurrency and number of experts."""

    concurrency: np.ndarray  # int, ascending
    tokens_per_s: dict[str, np.ndarray]  # of each column, prompts and outputs together


def read(path: str | os.PathLike) -> MeasuredTable:
    """Reads a table.

    Raises:
        ValueError: it has another form, or a number that is not positive.
        OSError: it cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [line for _, line in zip(range(_MOST_LINES), csv.reader(file)) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}; expected a CSV file") from error
    head, *body = lines or [[]]
    named = head[:1] == ["concurrency"] and len(head) > 1 and len(set(head)) == len(head)
    if not named or not all(_COLUMN.fullmatch(name) for name in head[1:]):
        raise ValueError(f"{path}: its head is {','.join(head)!r}; expected concurrency,k6,k4 or concurrency,e64,e32")
    try:
        rows = np.array([[float(cell) for cell in line] for line in body])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected a number for every column of every line") from None
    if rows.shape != (len(body), len(head)) or len(body) < 3 or not (np.isfinite(rows) & (rows > 0)).all():
        raise ValueError(f"{path}: expected three lines or more, each with {len(head)} positive numbers")
    concurrency = rows[:, 0].astype(int)
    if (concurrency != rows[:, 0]).any() or (np.diff(concurrency) <= 0).any():
        raise ValueError(f"{path}: expected whole, ascending numbers as concurrency")
    return MeasuredTable(concurrency, dict(zip(head[1:], rows.T[1:])))


def architecture_of(column: str, architecture: Architecture) -> Architecture:
    """The model of a column: with another number of active experts (`k4`) or of experts in total (`e32`).

    Raises:
        ValueError: the model cannot have that number.
    """
    kind, number = _COLUMN.fullmatch(column).groups()
    moe, number = architecture.moe, int(number)
    if kind == "k":
        changed = {"k": number}
    else:
        changed = {"num_experts": number, "k": min(moe.k, number), "num_experts_of_layers": ()}
    try:
        return dataclasses.replace(architecture, moe=dataclasses.replace(moe, k_of_layers=(), **changed))
    except ValueError as error:
        raise ValueError(f"column {column} of predict.measured: {error}") from None


def column_of(table: MeasuredTable, name: str, setting: str) -> np.ndarray:
    """The throughputs of one column; the message of an error names `setting`.

    Raises:
        ValueError: there is no such column.
    """
    if name not in table.tokens_per_s:
        raise ValueError(f"{setting} = {name!r}: expected one of {', '.join(table.tokens_per_s)}")
    return table.tokens_per_s[name]
