"""The meshes that divide a model, listed by hand, and their order."""

import pytest

from moe_jax.config.mesh import MeshConfig
from moe_jax.cost.chips import ChipPeaks
from moe_jax.cost.parallel import StepShape
from moe_jax.study import meshes
from tests import tiny_model


def sizes(mesh):
    return mesh.data, mesh.expert, mesh.tensor, len(mesh.expert_axes)


def test_all_that_divide_the_model_and_the_rows():
    """16 experts of 24 channels, 4 heads, 2 of keys; 6 rows take no four parts."""
    found = meshes.dividing(4, tiny_model.ARCHITECTURE, 6, MeshConfig())
    assert [sizes(mesh) for mesh in found] == [
        (1, 1, 4, 1),
        (1, 2, 2, 1),
        (1, 4, 1, 1),
        *[(2, 1, 2, 1), (2, 1, 2, 2), (2, 2, 1, 1), (2, 2, 1, 2)],
    ]


def test_training_divides_matrices_over_data_too():
    found = list(meshes.dividing(4, tiny_model.ARCHITECTURE, 8, MeshConfig(), training=True))
    assert {mesh.fsdp for mesh in found} == {1, 2, 4}
    assert all(mesh.fsdp == mesh.data and mesh.expert_axes == ("expert",) for mesh in found)


def test_no_mesh_of_more_than_experts_and_heads():
    assert list(meshes.dividing(7, tiny_model.ARCHITECTURE, 8, MeshConfig())) == []


@pytest.mark.parametrize(("memory_bytes", "order"), [(100, "cab"), (50, "abc"), (10, "abc")])
def test_the_fastest_that_fits_is_first_and_what_does_not_fit_last_by_size(memory_bytes, order):
    held = {"a": (40, 3.0), "b": (50, 4.0), "c": (60, 1.0)}
    chip = ChipPeaks(memory_bytes, 1.0, 1.0, 1.0, "")

    def counted(name):
        return meshes.CountedMesh(name, None, StepShape(1, 1, 0, 1), held[name][0], None, held[name][1])

    ranked = meshes.ranked(list(held), counted, chip)
    assert "".join(one.mesh for one in ranked) == order
