"""These tests need eight devices; `test_on_eight_devices.py` runs them so."""

import pytest

from tests import tiny_model
from tests.eight_devices import mesh_of, to_ignore

__all__ = ["folder", "mesh_of"]
collect_ignore_glob = to_ignore()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model with dense and MoE layers, shared experts, four query heads and two key and value heads."""
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")
