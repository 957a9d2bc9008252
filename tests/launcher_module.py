"""Launchers and benchmarks as modules: each is imported once, since its flags can be defined once."""

import functools
import importlib.util
import pathlib
import types

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def load(name: str, folder: str = "launch") -> types.ModuleType:
    """Imports `FOLDER/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
