"""Runs launchers in their own processes, as users do, and checks how they end."""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a launcher ended; status is None if it had to be killed."""

    status: int | None
    stdout: str
    stderr: str


def command_line(launcher: str, *flags: str) -> list[str]:
    """`python launch/LAUNCHER.py FLAGS`."""
    return [sys.executable, str(ROOT / "launch" / f"{launcher}.py"), *flags]


def environment(path: Sequence[pathlib.Path] = ()) -> dict[str, str]:
    """The environment, with `path` first in PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}


def run(
    launcher: str,
    *flags: str,
    folder: pathlib.Path,
    path: Sequence[pathlib.Path] = (),
    within: Sequence[str] = (),
    timeout: float = 300,
    stdin: bytes = b"",
    **options,
) -> Ended:
    """Runs a launcher to its end from a folder; `within` goes before its command line."""
    try:
        done = subprocess.run(
            [*within, *command_line(launcher, *flags)],
            env=environment(path),
            cwd=folder,
            input=stdin,
            capture_output=True,
            timeout=timeout,
            **options,
        )
    except subprocess.TimeoutExpired as expired:
        stdout, stderr = (text or b"" for text in (expired.stdout, expired.stderr))
        return Ended(None, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
    return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def not_refused(ended: Ended, says: str = "") -> str:
    """What is wrong with a refusal, which needs status 2 and a single line `error: ...`; empty if nothing is."""
    if ended.status is None:
        return f"it hangs; stderr {ended.stderr[-500:]!r}"
    lines = ended.stderr.splitlines()
    if ended.status != 2 or ended.stdout or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"status {ended.status}, stdout {ended.stdout[-200:]!r}, stderr {ended.stderr[-1000:]!r}"
    return "" if re.search(says, lines[0]) else f"{lines[0]!r} does not say {says!r}"


def entries(folder: pathlib.Path) -> set[str]:
    """The paths below a folder; links are not followed."""
    return {
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, folders, names in os.walk(folder)
        for name in (*folders, *names)
    }


def two_at_a_time(function: Callable, items: Iterable) -> list:
    """The results of a function that mostly waits for processes, run two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))
