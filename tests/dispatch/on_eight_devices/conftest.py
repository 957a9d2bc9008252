"""These tests need eight devices, which JAX must be told before it starts; `test_on_eight_devices.py` runs them so."""

import jax
import pytest
from jax.sharding import AxisType

collect_ignore_glob = [] if jax.config.jax_num_cpu_devices == 8 else ["test_*.py"]


@pytest.fixture(scope="session")
def mesh_of():
    """(data, expert, tensor) -> a mesh of the eight devices."""
    return lambda sizes: jax.make_mesh(sizes, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
