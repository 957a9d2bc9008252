"""Implementations are chosen by platform, named in every result, and refused in one line if they cannot run."""

import pytest

from moe_jax.config.schema import KernelsConfig
from moe_jax.engine.request import execution_of
from moe_jax.kernels import chooser, compiled
from moe_jax.kernels.chooser import Kernels, resolve
from tests import tiny_model

PLAIN = Kernels("blocked", "xla", "xla", "blocked")


def test_auto_resolves_by_platform():
    assert resolve("cpu") == Kernels("native", "native", "native", "native")
    assert resolve("gpu") == Kernels("padded", "xla", "xla", "blocked")
    assert resolve("tpu") == Kernels("ragged_dot", "xla", "xla", "blocked")


def test_without_a_compiler_a_cpu_runs_plain_jax_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    assert resolve("cpu") == PLAIN
    assert resolve("gpu") == Kernels("padded", "xla", "xla", "blocked")


def test_one_operation_can_be_set_by_itself():
    for name in ("blocked", "padded", "ragged_dot"):
        assert resolve("cpu", {"grouped_matmul": name}) == resolve("cpu")._replace(grouped_matmul=name)
    assert resolve("cpu", PLAIN._asdict()) == PLAIN


@pytest.mark.parametrize(
    ("platform", "asked", "message"),
    [
        ("rocm", {}, "kernels.grouped_matmul = 'auto': nothing is written for 'rocm'; name one of native"),
        ("cpu", {"grouped_matmul": "bloked"}, "kernels.grouped_matmul = 'bloked': expected auto or one of native"),
        ("gpu", {"projection": "native"}, "kernels.projection = 'native': runs on CPUs only, not on 'gpu'; xla would"),
        ("cpu", {"grouped_matmul": "pallas_gpu"}, "kernels.grouped_matmul = 'pallas_gpu': runs on GPUs only"),
        ("METAL", {**PLAIN._asdict(), "grouped_matmul": "pallas_gpu"}, "kernels.grouped_matmul = 'pallas_gpu': "),
        ("cpu", {"expert_ffn": "native"}, "kernels.expert_ffn: expected one of grouped_matmul, projection"),
    ],
)
def test_what_cannot_run_is_refused(platform, asked, message):
    with pytest.raises(ValueError) as refusal:
        resolve(platform, asked)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_native_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler \(c\+\+\) on PATH; xla would run"):
        resolve("cpu", {"cached_attention": "native"})


def test_every_operation_is_in_configurations_and_in_results():
    assert set(chooser.OPERATIONS) == set(vars(KernelsConfig()))
    execution = execution_of(tiny_model.ARCHITECTURE, kernels=KernelsConfig(projection="xla"))
    assert execution.implementations == resolve("cpu")._replace(projection="xla")._asdict()
