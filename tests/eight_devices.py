"""Tests on a mesh of eight virtual devices, which JAX must be told of before it starts: in a process of their own."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 8


def run_tests(folder: str, *arguments: str) -> None:
    """Runs the tests of a folder with eight devices; some must be selected, and all pass."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    command_line = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", folder, *arguments]
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def to_ignore() -> list[str]:
    """What the `conftest.py` of such a folder leaves out where there are fewer devices."""
    return [] if jax.config.jax_num_cpu_devices == DEVICES else ["test_*.py"]


@pytest.fixture(scope="session")
def mesh_of():
    """(data, expert, tensor) -> a mesh of the eight devices."""
    return lambda sizes: jax.make_mesh(sizes, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
