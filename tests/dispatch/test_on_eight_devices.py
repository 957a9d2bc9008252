"""Runs the tests of dispatch on a mesh in a process of their own, with eight virtual devices."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = "tests/dispatch/on_eight_devices"


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command_line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", FOLDER, *arguments]
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.processes
def test_dispatch_on_eight_devices():
    assert " passed" in run("-v")


@pytest.mark.slow
def test_dispatch_on_every_mesh():
    assert " passed" in run("-v", "-m", "slow")
