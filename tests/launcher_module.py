"""Launchers as modules: each is imported once, since its flags can be defined once."""

import functools
import importlib.util
import pathlib
import types

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def import_launcher(name: str) -> types.ModuleType:
    """Imports `launch/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
