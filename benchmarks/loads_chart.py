"""Draws throughput over load, one curve for each policy, from what `loads.py` wrote.

python benchmarks/loads_chart.py out/loads_olmoe
"""

import json
import pathlib
import sys

from moe_jax import files
from moe_jax.report.plots import draw_throughput


def main(folder: pathlib.Path) -> None:
    """Reads FOLDER/loads.jsonl, also of a run that was cut off; writes FOLDER/throughput.png."""
    lines = [json.loads(line) for line in (folder / "loads.jsonl").read_text().splitlines()]
    files.write_atomically(folder / "throughput.png", draw_throughput(lines))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
