import jax
import psutil
import pytest

from moe_jax import memory


def test_what_does_not_fit_is_refused_with_sizes_and_a_remedy():
    memory.require("the model", 22_000_000_000, 22_000_000_000, "a smaller model")
    with pytest.raises(ValueError) as refused:
        memory.require("the model", 31_000_000_000, 22_000_000_000, "a smaller model")
    assert str(refused.value) == "the model needs 31.0 GB of memory, 22.0 GB available: expected a smaller model"


def test_a_device_that_reports_its_memory_is_asked_for_what_is_free(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 80, "bytes_in_use": 30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(), Device()])
    assert memory.device_bytes() == 50


def test_a_cpu_has_the_memory_of_the_machine(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 7}))
    assert memory.device_bytes() == memory.host_bytes() == 7
