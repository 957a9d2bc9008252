"""Runs the tests of models on a mesh."""

import pytest

from tests.eight_devices import run_tests

FOLDER = "tests/mesh/on_eight_devices"


@pytest.mark.processes
def test_models_on_eight_devices():
    run_tests(FOLDER)


@pytest.mark.processes
def test_models_on_every_mesh():
    run_tests(FOLDER, "-m", "processes")


@pytest.mark.slow
def test_models_with_every_dispatch():
    run_tests(FOLDER, "-m", "slow")
