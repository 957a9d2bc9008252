"""Launchers and benchmarks in this process: each is imported once, since its flags can be defined once."""

import functools
import importlib.util
import io
import pathlib
import sys
import types
import unittest.mock

from absl import flags
from absl.testing import flagsaver

from moe_jax import command
from moe_jax.config import gin

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def import_launcher(name: str, folder: str = "launch") -> types.ModuleType:
    """Imports `FOLDER/NAME.py`, which may import files beside it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with unittest.mock.patch.object(sys, "path", [str(ROOT / folder), *sys.path]):
        spec.loader.exec_module(module)
    return module


def run_main(
    name: str,
    settings: dict[str, object],
    out: pathlib.Path,
    *arguments: str,
    config: pathlib.Path | None = None,
) -> str:
    """Runs a launcher's `main` with settings and flags, `out` being an existing folder; returns what it prints."""
    overrides = [f"{setting}={value}" for setting, value in settings.items()]
    launcher = import_launcher(name)  # defines its flags
    run = command.Command(name, gin.read_config(config, overrides), out, False, io.StringIO())
    with flagsaver.flagsaver():
        flags.FLAGS([name, *arguments])
        launcher.main(run)
    return run.output.getvalue()
