"""A launcher that does what its arguments say, started in its own process."""

import os
import pathlib
import subprocess
import sys

import pytest

from moe_jax import files

ROOT = pathlib.Path(__file__).parents[2]
LAUNCHER = '''"""Probes: what one launcher does."""

import time

from moe_jax import command


def main(run):
    kind, _, detail = run.config.model.path.partition(":")
    if kind == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("saving", flush=True)
            time.sleep(0.2)
            (run.out / "saved").write_text("what is done")
            if detail == "raise":
                raise
            return 0
    if kind == "value":
        raise ValueError("two\\n  lines")
    if kind == "os":
        open(detail)
    if kind == "full":
        raise OSError(28, "No space left on device")
    if kind == "bug":
        raise RuntimeError("a bug")
    if kind == "print":
        print("progress")
        return 0
    if kind == "status":
        return int(detail)
    with run.timed("run"):
        print("progress")
    with run.timed("run"):
        pass
    run.implementations["expert_ffn"] = "blocked"
    figures = {"speed": {"value": 2.5, "unit": "tokens/s"}, "loss": {"value": float("nan"), "unit": "nats"}}
    run.finish(figures, rows=[{"policy": "topk:3", "figures": figures}], text="speed 2.5 tokens/s")


if __name__ == "__main__":
    command.run(main)
'''
# Importing JAX takes a second: most tests import a stand-in, or one that must not be imported.
STANDINS = {
    "hollow": "class config:\n    update = staticmethod(lambda name, value: None)\ndef devices(): pass\n",
    "forbidden": 'raise RuntimeError("JAX is imported before the command line has been checked")\n',
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the launcher in an empty folder, with JAX or a stand-in for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    files.write_atomically("launch/probe.py", LAUNCHER)
    for name, source in STANDINS.items():
        files.write_atomically(f"{name}/jax.py", source)

    def start(*arguments, jax="hollow", **popen):
        paths = [str(ROOT)] + ([] if jax == "real" else [str(tmp_path / jax)])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
        return subprocess.Popen(
            [sys.executable, "launch/probe.py", *arguments], env=environment, text=True, errors="replace", **pipes
        )

    return start
