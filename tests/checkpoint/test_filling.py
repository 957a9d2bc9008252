"""Filling arrays from stored tensors, and what can go wrong between the table and the last byte."""

import numpy as np
import pytest

from moe_jax.checkpoint import filling, safetensors_file
from moe_jax.kernels import compiled

COUNT = 3_000_000  # more than one chunk


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {name: np.arange(COUNT, dtype=np.float32) + number for number, name in enumerate("abcd")}
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    safetensors_file.write_file(path, shapes, arrays.values())
    return safetensors_file.read_table(path)


def fill(stored, dtype):
    arrays = {name: filling.allocate((COUNT,), np.dtype(dtype)) for name in stored}
    filling.fill([filling.Source(name, stored[name], array) for name, array in arrays.items()])
    return arrays


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16"])
def test_every_piece_arrives_in_aligned_memory(stored, dtype):
    for number, array in enumerate(fill(stored, dtype).values()):
        assert array.ctypes.data % 64 == 0
        np.testing.assert_array_equal(array, (np.arange(COUNT, dtype=np.float32) + number).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_position_in_a_cache_line_is_copied_and_checked(dtype):
    dtype, bits = np.dtype(dtype), filling.EXPONENTS[np.dtype(dtype)][0]
    numbers = np.arange(1, 300).astype(dtype)
    for first in (0, 1, 7):
        for wrong in (None, 0, 31, 150, len(numbers) - first - 1):
            given, memory = numbers[first:].copy(), np.zeros(400, dtype)
            if wrong is not None:
                given[wrong] = np.inf if wrong % 2 else np.nan
            piece = memory[first + 3 : first + 3 + len(given)]
            assert filling._copy(piece, given, filling._copying()) == (wrong is None)
            np.testing.assert_array_equal(piece.view(bits), given.view(bits))
            assert not memory[: first + 3].any() and not memory[first + 3 + len(given) :].any()


@pytest.mark.parametrize("copying", [filling._copying(), None])
@pytest.mark.parametrize("place", [0, COUNT // 2, COUNT - 1])
def test_the_first_tensor_that_is_not_finite_is_named(stored, place, copying, monkeypatch):
    monkeypatch.setattr(filling, "_copying", lambda: copying)
    for name in "bd":
        data = np.memmap(stored[name].path, np.float32, "r+", stored[name].start, (COUNT,))
        data[place] = np.nan
        data.flush()
    with pytest.raises(ValueError, match="tensor b holds NaN"):
        fill(stored, np.float32)


def test_a_file_that_was_cut_since_its_table_was_read(stored):
    with open(stored["a"].path, "r+b") as file:
        file.truncate(stored["d"].start + 4 * COUNT - 1)
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated"):
        fill(stored, np.float32)


def test_without_a_compiler_numpy_copies_with_a_warning(stored, monkeypatch, caplog):
    def refuse(source):
        raise ValueError("c++ cannot compile copying.cc")

    monkeypatch.setattr(compiled, "open_library", refuse)
    monkeypatch.setattr(filling, "_copying", filling._copying.__wrapped__)
    np.testing.assert_array_equal(fill(stored, np.float32)["b"], np.arange(COUNT, dtype=np.float32) + 1)
    assert "loading is slower: c++ cannot compile copying.cc" in caplog.text


def test_another_number_of_values_is_refused(stored):
    array = filling.allocate((COUNT + 1,), np.dtype(np.float32))
    with pytest.raises(ValueError, match=f"tensor a has {COUNT} values: expected {COUNT + 1}"):
        filling.fill([filling.Source("a", stored["a"], array)])


def test_empty_arrays_and_scalars(tmp_path):
    shapes = {"none": (np.dtype(np.float32), (0, 3)), "one": (np.dtype(np.float32), ())}
    arrays = [np.zeros((0, 3), np.float32), np.ones((), np.float32)]
    safetensors_file.write_file(tmp_path / "a.safetensors", shapes, arrays)
    stored = safetensors_file.read_table(tmp_path / "a.safetensors")
    filled = {name: filling.allocate(one.shape, one.dtype) for name, one in stored.items()}
    filling.fill([filling.Source(name, stored[name], array) for name, array in filled.items()])
    assert filled["none"].shape == (0, 3) and filled["one"] == 1
