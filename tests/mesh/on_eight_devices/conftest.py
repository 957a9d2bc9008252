"""These tests need eight devices, which JAX must be told before it starts; `test_on_eight_devices.py` runs them so."""

import jax
import pytest
from jax.sharding import AxisType

from tests import tiny_model

collect_ignore_glob = [] if jax.config.jax_num_cpu_devices == 8 else ["test_*.py"]


@pytest.fixture(scope="session")
def mesh_of():
    """(data, expert, tensor) -> a mesh of the eight devices."""
    return lambda sizes: jax.make_mesh(sizes, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model with dense and MoE layers, shared experts, four query heads and two key and value heads."""
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")
