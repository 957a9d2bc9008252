"""Names of topologies, and one line where the compiler is not installed or the topology does not exist."""

import importlib.util

import pytest

from moe_jax.study import topologies


def test_names():
    assert topologies.parse("v5p:4x4x8") == ("v5p", (4, 4, 8))
    assert topologies.parse("h100:8") == ("h100", (8,))
    assert topologies.parse("cpu:2") == ("cpu", (2,))


@pytest.mark.parametrize(
    "name",
    ["", "v5p", "v5p:", "v5p:4x4x4x4", "v9:2x2", "h100:9", "h100:2x2", "h100:0", "cpu:2x2", "V5P:2x2x1"],
)
def test_a_name_that_means_nothing_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"compile.topology = '{name}': expected v5e, v5p") as error:
        topologies.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v5p:2x2x1", "h100:8"])
def test_without_the_compiler_the_package_is_named(name, monkeypatch):
    found = importlib.util.find_spec
    missing = {"libtpu", "nvidia", "jax_plugins.xla_cuda13"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(topologies.NoCompilerError, match=r"pip install -r requirements-aot(-gpu)?.txt") as error:
        topologies.find(name)
    assert "\n" not in str(error.value)


def test_more_virtual_devices_than_there_are():
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=64 makes more"):
        topologies.find("cpu:64")
