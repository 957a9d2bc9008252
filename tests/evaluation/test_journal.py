"""Parts are computed once, never used for another measurement, and refused if damaged."""

import numpy as np
import pytest

from moe_jax.evaluation.journal import Journal


def part(value):
    return lambda: {"x": np.array([value, value + 1])}


def never():
    raise AssertionError("computed again")


def test_a_part_is_computed_once(tmp_path):
    first = Journal(tmp_path / "parts", {"k": 8, "seed": 0}).once("a", part(1.5))
    again = Journal(tmp_path / "parts", {"seed": 0, "k": 8}).once("a", never)
    np.testing.assert_array_equal(first["x"], again["x"])


def test_another_measurement_has_parts_of_its_own(tmp_path):
    Journal(tmp_path, {"k": 8}).once("a", part(1))
    other = Journal(tmp_path, {"k": 4})
    assert other.once("a", part(5))["x"][0] == 5
    other.forget()
    assert Journal(tmp_path, {"k": 8}).once("a", never)["x"][0] == 1
    Journal(tmp_path, {"k": 8}).forget()
    assert not tmp_path.exists()


def test_a_failed_part_leaves_no_file(tmp_path):
    with pytest.raises(AssertionError):
        Journal(tmp_path, {}).once("a", never)
    assert not any(tmp_path.rglob("*.npz"))
    assert Journal(None, {}).once("a", part(3))["x"].tolist() == [3, 4]


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_damaged_part_is_refused_by_name(tmp_path, keep):
    journal = Journal(tmp_path, {})
    journal.once("a", part(1))
    [path] = tmp_path.rglob("a.npz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.npz is damaged .*: remove it"):
        journal.once("a", never)
