"""Implementations are chosen by platform, named in every result, and refused in one line if they cannot run."""

import types

import jax
import pytest

from moe_jax.config.schema import KernelsConfig
from moe_jax.engine.request import execution_of
from moe_jax.kernels import chooser, compiled, quantized
from moe_jax.kernels.chooser import Kernels
from tests import tiny_model

PLAIN = Kernels("blocked", "xla", "xla", "blocked")
ON_A_GPU = Kernels("padded", "xla", "sums", "blocked")
TINY = tiny_model.ARCHITECTURE
FOR_HOPPER = tiny_model.changed(decoder={"d_model": 128}, moe={"expert_hidden": 64})


def resolve(platform, asked=None, architecture=TINY, dtype="float32", expert_dtype=""):
    return chooser.resolve(platform, architecture, dtype, asked, expert_dtype=expert_dtype)


@pytest.fixture(autouse=True)
def say_everything():
    chooser._warn.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """A machine whose first device says that it is a Hopper GPU; none is needed to choose."""
    pretend(monkeypatch, "9.0")


def pretend(monkeypatch, capability):
    device = types.SimpleNamespace(compute_capability=capability, core_count=132)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))


def test_auto_resolves_by_platform():
    assert resolve("cpu") == Kernels("native", "native", "native", "native")
    assert resolve("gpu") == ON_A_GPU
    assert resolve("tpu") == Kernels("pallas_tpu", "xla", "matmul", "splash")
    assert resolve("tpu", dtype="float16") == Kernels("ragged_dot", "xla", "matmul", "blocked")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_auto_takes_the_hopper_kernels_where_they_run(hopper, caplog, dtype):
    expected = ON_A_GPU._replace(grouped_matmul="pallas_gpu", projection="pallas_gpu")
    assert resolve("gpu", architecture=FOR_HOPPER, dtype=dtype) == expected
    assert not caplog.messages


@pytest.mark.parametrize(
    ("capability", "architecture", "dtype", "reason"),
    [
        ("8.0", FOR_HOPPER, "bfloat16", "needs a Hopper GPU (compute capability 9.0), not 8.0"),
        ("10.0", FOR_HOPPER, "bfloat16", "needs a Hopper GPU (compute capability 9.0), not 10.0"),
        ("9.0", FOR_HOPPER, "float32", "multiplies bfloat16 and float16, not float32"),
        ("9.0", TINY, "bfloat16", "needs matrices in multiples of 64 by 64, not 24 by 64"),
    ],
)
def test_auto_says_why_the_hopper_kernels_do_not_run(monkeypatch, caplog, capability, architecture, dtype, reason):
    pretend(monkeypatch, capability)
    found = [resolve("gpu", architecture=architecture, dtype=dtype) for _ in range(2)]
    others = "grouped_matmul is 'padded'", "projection is 'xla'"
    if architecture is TINY:  # whose width is a multiple of 64
        assert found == [ON_A_GPU._replace(projection="pallas_gpu")] * 2
        others = others[:1]
    else:
        assert found == [ON_A_GPU] * 2
    assert caplog.messages == [f"kernels.{other}, which is slower: 'pallas_gpu' {reason}" for other in others]
    with pytest.raises(ValueError) as refusal:
        resolve("gpu", {"grouped_matmul": "pallas_gpu"}, architecture, dtype)
    assert str(refusal.value) == f"kernels.grouped_matmul = 'pallas_gpu': {reason}; padded would run"


def test_auto_says_why_the_tpu_kernels_do_not_run(caplog):
    assert resolve("tpu", dtype="float16").grouped_matmul == "ragged_dot"
    reason = "multiplies bfloat16 and float32, not float16"
    assert caplog.messages == [
        f"kernels.grouped_matmul is 'ragged_dot', which is slower: 'pallas_tpu' {reason}",
        f"kernels.causal_attention is 'blocked', which is slower: 'splash' {reason}",
    ]


@pytest.mark.parametrize(("kind", "expected"), [("TPU v4", "ragged_dot"), ("TPU v5 lite", "pallas_tpu")])
def test_auto_takes_the_tpu_kernels_from_v5e_on(monkeypatch, kind, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert resolve("tpu").grouped_matmul == expected
    if expected != "pallas_tpu":
        reason = f"needs the vector memory of a TPU v5e or newer, not {kind}; ragged_dot would run"
        with pytest.raises(ValueError) as refusal:
            resolve("tpu", {"grouped_matmul": "pallas_tpu"})
        assert str(refusal.value) == f"kernels.grouped_matmul = 'pallas_tpu': {reason}"


def test_projections_on_a_mesh_and_of_odd_widths_are_those_of_xla(hopper):
    found = chooser.resolve("gpu", FOR_HOPPER, "bfloat16", num_devices=2)
    assert (found.grouped_matmul, found.projection) == ("pallas_gpu", "xla")
    odd = tiny_model.changed(decoder={"d_model": 96}, moe={"expert_hidden": 64})
    assert resolve("gpu", architecture=odd, dtype="bfloat16").projection == "xla"


@pytest.mark.parametrize("expert_dtype", quantized.DTYPES)
def test_auto_takes_what_runs_experts_in_eight_bits(hopper, caplog, expert_dtype):
    settings = {"architecture": FOR_HOPPER, "dtype": "bfloat16", "expert_dtype": expert_dtype}
    assert resolve("cpu", **settings).grouped_matmul == "native"
    assert resolve("gpu", **settings) == ON_A_GPU._replace(grouped_matmul="blocked", projection="pallas_gpu")
    reason = f"takes no weights in eight bits ({expert_dtype})"
    slower = "kernels.grouped_matmul is 'blocked', which is slower:"
    assert caplog.messages == [f"{slower} {one!r} {reason}" for one in ("pallas_gpu", "padded")]
    for name in ("pallas_gpu", "padded"):
        with pytest.raises(ValueError) as refusal:
            resolve("gpu", {"grouped_matmul": name}, **settings)
        assert str(refusal.value) == f"kernels.grouped_matmul = {name!r}: {reason}; blocked would run"


def test_tpu_kernels_take_eight_bits_in_blocks_that_fill_lanes(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5e")])
    for hidden in (64, 128, 384):
        even = tiny_model.changed(moe={"expert_hidden": hidden})
        assert resolve("tpu", architecture=even, expert_dtype="float8_e4m3fn").grouped_matmul == "pallas_tpu"
    odd = tiny_model.changed(moe={"expert_hidden": 192})  # blocks of 64
    assert resolve("tpu", architecture=odd, expert_dtype="float8_e4m3fn").grouped_matmul == "blocked"
    assert resolve("tpu", architecture=odd, expert_dtype="int8").grouped_matmul == "pallas_tpu"


def test_an_old_jax_has_no_hopper_kernels(hopper, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ValueError, match=r"needs jax 0\.11 or newer, not .*; padded would run"):
        resolve("gpu", {"grouped_matmul": "pallas_gpu"}, FOR_HOPPER, "bfloat16")


def test_without_a_compiler_a_cpu_runs_plain_jax_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    assert resolve("cpu") == PLAIN
    lacks = "which is slower: 'native' needs a C++ compiler (c++) on PATH"
    expected = [f"kernels.{operation} is {name!r}, {lacks}" for operation, name in PLAIN._asdict().items()]
    assert caplog.messages == expected


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
        ("gpu", {"grouped_matmul": "pallas_tpu"}, "kernels.grouped_matmul = 'pallas_tpu': runs on TPUs only"),
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
    expected = resolve("cpu")._replace(projection="xla")._asdict()
    assert execution.implementations == expected
    execution = execution_of(tiny_model.ARCHITECTURE, kernels=KernelsConfig(projection="xla"), expert_dtype="int8")
    assert execution.implementations == expected | {"expert_dtype": "int8"}
