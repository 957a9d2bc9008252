"""C++ kernels: compiled once, found in the cache, and refused in one line if they cannot be compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import compiled
from moe_jax.kernels.grouped_matmul import native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe_jax" / "kernels"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "answer.h").write_text("constexpr int kAnswer = 1;\n")
    (folder / "answer.cc").write_text('#include "answer.h"\n#include "native.h"\nint answer() { return kAnswer; }\n')
    return folder / "answer.cc"


def test_a_source_is_compiled_once(cache, source):
    first = compiled._compile(source)
    written = first.stat().st_mtime_ns
    assert compiled._compile(source) == first and first.stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [first]


def test_another_source_header_or_processor_is_another_library(cache, source, monkeypatch):
    libraries = [compiled._compile(source)]
    source.write_text(source.read_text() + "// changed\n")
    libraries.append(compiled._compile(source))
    source.with_suffix(".h").write_text("constexpr int kAnswer = 2;\n")
    libraries.append(compiled._compile(source))
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    libraries.append(compiled._compile(source))
    assert len(set(libraries)) == len(list(cache.iterdir())) == 4


def test_without_a_writable_cache_a_source_is_compiled_each_time(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert compiled._compile(source).exists()


def test_a_source_that_does_not_compile_is_refused_in_one_line(cache, tmp_path):
    wrong = tmp_path / "wrong.cc"
    wrong.write_text("int f( { return 1; }\n")
    with pytest.raises(ValueError, match=r"cannot compile wrong\.cc: .*error: ") as refusal:
        compiled._compile(wrong)
    assert len(str(refusal.value).splitlines()) == 1
    assert list(cache.iterdir()) == []


def test_without_a_compiler_nothing_is_compiled(source, monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    with pytest.raises(ValueError, match="needs a C"):
        compiled._compile(source)


def test_unsupported_dtypes_are_refused():
    rows, weights = jnp.ones((2, 4), jnp.float32), jnp.ones((1, 1, 3, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match="rows are float32, weights bfloat16"):
        native.forward(rows, weights, np.array([2]), 0)


def test_parallel_calls_do_not_wait_for_each_other():
    """Independent calls, each with more work items than the pool has threads."""
    rows = jnp.ones((512, 256))
    weights = jnp.ones((1, 8, 512, 256))
    sizes = jnp.full(8, 64, jnp.int32)

    @jax.jit
    def both(rows, weights):
        return [native.forward(rows + shift, weights, sizes, 0) for shift in range(8)]

    for shift, out in enumerate(both(rows, weights)):
        np.testing.assert_array_equal(out, 256.0 * (1 + shift))
