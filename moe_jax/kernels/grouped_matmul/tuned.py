"""Tile sizes that were measured on a device, in one dated table, `tuned.json`; what it lacks follows a rule.

`launch/benchmark.py --tune` measures and adds entries. An entry is for a device, a dtype, a product of an
implementation, the shape of its matrices and a class of rows per expert, since the best tiles differ between a few rows
and hundreds.
"""

import dataclasses
import functools
import json
import pathlib

from moe_jax import files

TABLE = pathlib.Path(__file__).with_name("tuned.json")


@dataclasses.dataclass(frozen=True)
class TileKey:
    """What an entry is looked up by.

    Attributes:
        device: as `jax.Device.device_kind` has it.
        implementation: its name, such as "pallas_gpu".
        product: the name of its function, such as "forward".
        dtype: of rows and matrices.
        experts: number of matrices in a layer.
        outputs: of a matrix [F, D], F.
        inputs: D.
        rows_class: as `rows_class` has it.
    """

    device: str
    implementation: str
    product: str
    dtype: str
    experts: int
    outputs: int
    inputs: int
    rows_class: int


def rows_class(num_rows: int, experts: int) -> int:
    """Rows per expert, rounded down to a power of two; 1 for fewer than two."""
    return 1 << (max(1, num_rows // experts).bit_length() - 1)


def lookup(case: TileKey) -> tuple[int, ...] | None:
    """The measured tile sizes of a case; None where nobody has measured."""
    return _read(TABLE).get(case)


@functools.cache
def _read(path: pathlib.Path) -> dict[TileKey, tuple[int, ...]]:
    entries = json.loads(path.read_text())
    return {TileKey(**entry["case"]): tuple(entry["tiles"]) for entry in entries}


def write(case: TileKey, tiles: tuple[int, ...], microseconds: float, date: str, jax_version: str) -> None:
    """Adds an entry to the table, or replaces the one of that case; the file is replaced whole.

    Args:
        case: what was measured.
        tiles: the fastest.
        microseconds: of one call with them.
        date: ISO.
        jax_version: that compiled them.
    """
    entries = [entry for entry in json.loads(TABLE.read_text()) if TileKey(**entry["case"]) != case]
    measured = {"tiles": list(tiles), "microseconds": round(microseconds, 1), "date": date, "jax": jax_version}
    entries.append({"case": dataclasses.asdict(case), **measured})
    entries.sort(key=lambda entry: tuple(map(str, entry["case"].values())))
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    files.write_atomically(TABLE, f"[\n{lines}\n]\n")
    _read.cache_clear()
