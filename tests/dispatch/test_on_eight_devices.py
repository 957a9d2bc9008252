"""Runs the tests of dispatch on a mesh."""

import pytest

from tests.eight_devices import run_tests

FOLDER = "tests/dispatch/on_eight_devices"


@pytest.mark.processes
def test_dispatch_on_eight_devices():
    run_tests(FOLDER)


@pytest.mark.slow
def test_dispatch_on_every_mesh():
    run_tests(FOLDER, "-m", "slow")
