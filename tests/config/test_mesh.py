"""A mesh that does not fit the model, the batch or the machine is refused in one line."""

import pytest

from moe_jax.config.mesh import MeshConfig
from tests import tiny_model

LATENT = tiny_model.changed(attention={"kind": "latent", "num_kv_heads": 4, "qk_norm": False})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": 0}, r"mesh\.data = 0: expected a positive number"),
        ({"data": 4, "fsdp": 2}, r"mesh\.fsdp = 2: expected 1, or mesh\.data = 4"),
        ({"expert_axes": ("tensor",)}, r"mesh\.expert_axes = \('tensor',\): expected"),
        ({"dispatch": "ragged"}, r"mesh\.dispatch = 'ragged': expected auto or local on one device"),
        ({"capacity": 1.0}, r"mesh\.capacity = 1\.0: expected 0, as all devices have all experts"),
        ({"data": 2, "capacity": 1.0}, r"mesh\.capacity = 1\.0: expected 0, as all devices have all experts"),
        ({"tensor": 4, "placement": "x"}, r"mesh\.placement = 'x': expected none, as all devices have all experts"),
        ({"expert": 2, "capacity": -1.0}, r"mesh\.capacity = -1\.0: expected 0 \(nothing is dropped\) or more"),
        ({"data": 2, "fsdp": 2, "expert_axes": ("data", "expert")}, r"mesh\.expert_axes = .* mesh\.fsdp = 2 uses"),
    ],
)
def test_impossible_settings_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        MeshConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "changed", "expected"),
    [
        ({"expert": 5}, {}, r"mesh\.expert = 5: expected a divisor of the model's 16 experts of a layer"),
        (
            {"data": 3, "expert": 4, "expert_axes": ("data", "expert")},
            {},
            r"mesh\.data times mesh\.expert = 12: expected a divisor of the model's 16 experts",
        ),
        ({"tensor": 5}, {}, r"mesh\.tensor = 5: expected a divisor of the model's 24 hidden channels of an expert"),
        ({"tensor": 8}, {}, r"mesh\.tensor = 8: expected a divisor of the model's 4 query heads"),
        (
            {"tensor": 2},
            {"attention": {"num_heads": 6, "num_kv_heads": 3}},
            r"mesh\.tensor = 2: expected a divisor of the model's 3 key and value heads",
        ),
        (
            {"tensor": 4},
            {"decoder": {"dense_hidden": 90}},
            r"mesh\.tensor = 4: expected a divisor of the model's 90 hidden channels of a dense layer",
        ),
        ({"tensor": 4}, {"decoder": {"vocab_size": 510}}, r"expected a divisor of the model's 510 tokens"),
        ({"data": 7, "fsdp": 7}, {}, r"mesh\.fsdp = 7: expected a divisor of the model's 64 channels"),
    ],
)
def test_a_mesh_that_does_not_divide_a_model_is_refused(settings, changed, expected):
    with pytest.raises(ValueError, match=expected):
        MeshConfig(**settings).require_divides(tiny_model.changed(**changed))


@pytest.mark.parametrize("architecture", [tiny_model.ARCHITECTURE, LATENT], ids=["grouped", "latent"])
def test_key_and_value_heads_may_be_fewer_than_the_tensor_axis_has_parts(architecture):
    MeshConfig(tensor=4).require_divides(architecture)


def test_a_batch_that_the_data_axis_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"training\.batch_size = 6: expected a multiple of mesh\.data = 4"):
        MeshConfig(data=4).require_batch("training.batch_size", 6)


@pytest.mark.parametrize(
    ("available", "processes", "expected"),
    [
        (4, 1, r"= 2 x 4 x 1 = 8 devices: expected at most 4; on a CPU, JAX_NUM_CPU_DEVICES=8 makes 8"),
        (16, 2, r"= 8 devices: expected all 16 of the 2 processes"),
    ],
)
def test_a_mesh_that_does_not_fit_the_machine_is_refused(available, processes, expected):
    mesh = MeshConfig(data=2, expert=4)
    with pytest.raises(ValueError, match=expected):
        mesh.require_devices(available, processes)
    mesh.require_devices(8, processes)
    mesh.require_devices(16)
