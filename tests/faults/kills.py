"""Kills a launcher at random moments and restarts it, again and again, until it finishes."""

import dataclasses
import json
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from tests.faults import launched


@dataclasses.dataclass
class KilledRun:
    """The kills and restarts of a launcher.

    Attributes:
        kills: kills that hit a live process.
        starts: starts of the launcher, the last of which finished.
        partial: number of `.partial` entries that killed processes left in the folder.
    """

    kills: int = 0
    starts: int = 0
    partial: int = 0


def started(launcher: str, flags: list[str], out: pathlib.Path) -> subprocess.Popen:
    """A running launcher."""
    return subprocess.Popen(
        launched.command_line(launcher, *flags, f"--out={out}"),
        env=launched.environment(),
        cwd=out.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_repeatedly(
    launcher: str,
    flags: list[str],
    out: pathlib.Path,
    *,
    kills: int,
    within_s: float,
    seed: int,
) -> KilledRun:
    """Runs a launcher to its end, killing it up to `kills` times.

    Args:
        launcher: the name of its file.
        flags: without --out.
        out: its output folder.
        kills: how many.
        within_s: what an undisturbed run takes; moments are spread evenly over all of it, starting and exporting
            included. If a run ends earlier, another one follows: a launcher started on a finished folder must not
            lose anything either.
        seed: the seed of the moments.
    """
    moments = random.Random(seed)
    killed = KilledRun()
    while killed.kills < kills:
        killed.starts += 1
        with started(launcher, flags, out) as process:
            time.sleep(moments.uniform(0, within_s))
            process.kill()
            stderr = process.stderr.read().decode(errors="replace")
        if process.returncode == -signal.SIGKILL:
            killed.kills += 1
        assert process.returncode in (0, -signal.SIGKILL), f"start {killed.starts}: {process.returncode}, {stderr}"
        if (out / "result.json").exists():
            json.loads((out / "result.json").read_text())
    killed.starts += 1
    ended = launched.run(launcher, *flags, f"--out={out}", folder=out.parent)
    assert ended.status == 0, f"after {killed.kills} kills: {ended.stderr}"
    killed.partial = sum(name.endswith(".partial") for name in launched.entries(out))
    return killed


def steps(out: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def wait_for_lines(process: subprocess.Popen, out: pathlib.Path, count: int) -> None:
    """Waits until metrics.jsonl has `count` lines, or the process has ended."""
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= count):
        time.sleep(0.002)


def assert_same(out: pathlib.Path, expected: pathlib.Path, files: Sequence[str]) -> None:
    """Two finished runs have the same figures, and the same bytes in some files."""
    assert figures(out) == figures(expected)
    for file in files:
        assert (out / file).read_bytes() == (expected / file).read_bytes(), file


def figures(out: pathlib.Path) -> list[dict[str, Any]]:
    """The figures of result.json and of its rows, without times."""
    result = json.loads((out / "result.json").read_text())
    return [
        {
            name: figure
            for name, figure in figures.items()
            if figure["unit"] != "s" and not figure["unit"].endswith("/s")
        }
        for figures in (result["figures"], *(row["figures"] for row in result["rows"]))
    ]
