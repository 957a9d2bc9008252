"""launch/benchmark.py: once in its own process, with all outputs; otherwise `main` is called here."""

import glob
import gzip
import json
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

from moe_jax.config import gin
from moe_jax.cost import hardware, roofline
from tests import launcher_module, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    **{"decoder.vocab_size": 96, "decoder.d_model": 32, "decoder.num_layers": 2, "decoder.max_context": 64},
    **{"training.sequence_length": 64, "attention.num_heads": 2, "attention.num_kv_heads": 1, "attention.head_dim": 16},
    **{"moe.expert_hidden": 16, "benchmark.decode_batches": "(1, 4)", "benchmark.prefill_lengths": "(16, 64)"},
    **{"benchmark.prompt_length": 8, "benchmark.rounds": 2, "benchmark.decode_steps": 3},
}
OF_CASE = {
    *("ms", "tokens_per_s", "bytes", "flops", "floor_ms", "over_floor"),
    *("distinct_experts_per_layer_step", "independent_experts_per_layer_step"),
}
CASES = ("decode_1", "decode_4", "prefill_16")


@pytest.fixture(scope="module")
def benchmark():
    """The launcher as a module."""
    return launcher_module.import_launcher("benchmark")


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Runs `main` with settings, with a short machine probe; returns the printed text and the figures."""
    monkeypatch.setattr(hardware, "STREAMED_BYTES", 2**22)
    monkeypatch.setattr(hardware, "WIDTH", 128)
    (tmp_path / "out").mkdir()

    def main(**settings):
        printed = launcher_module.run_main("benchmark", {**TINY, **settings}, tmp_path / "out")
        return printed, json.loads((tmp_path / "out" / "result.json").read_text())["figures"]

    return main


@pytest.mark.processes
def test_as_a_user_runs_it_with_a_profile(tmp_path):
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    command_line = [sys.executable, str(ROOT / "launch" / "benchmark.py"), *settings]
    command_line += ["--set=model.path=", "--trace", "--out=out", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command_line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    expected = {f"{case}_{name}" for case in CASES for name in OF_CASE} | {"bandwidth", "matmul_rate"}
    assert set(result["figures"]) == expected
    assert all(figure["value"] > 0 for figure in result["figures"].values())
    for case in CASES:
        first_ms, third_ms = result["figures"][f"{case}_ms"]["quartiles"]
        assert first_ms <= result["figures"][f"{case}_ms"]["value"] <= third_ms
    assert set(result["seconds"]) == {"load", "machine", "compile", "run"}
    assert result["implementations"] == tiny_model.KERNELS._asdict()
    check_profile(tmp_path / "out" / "trace")


def check_profile(folder):
    """Perfetto finds each case as a step, XProf the phases of a layer."""
    (perfetto,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
    with gzip.open(perfetto) as file:
        events = json.load(file)["traceEvents"]
    assert [case for case in CASES if not any(event.get("name") == case for event in events)] == []
    (xplane,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    profile = pathlib.Path(xplane).read_bytes()
    phases = ("attention", "route", "select", "dispatch", "experts", "combine", "shared_experts")
    for step in ("decode/", "prefill/"):
        assert step.encode() in profile
    assert [phase for phase in phases if f"/{phase}/".encode() not in profile] == []


def test_the_table_names_skipped_cases_and_the_source_of_routing(main):
    text, figures = main()
    for part in (
        *CASES,
        "GB/s",
        "GFLOP/s in float32 (at best",
        "replayed from assets/traces/demo.npz",
        "left out: prefill_64",
    ):
        assert part in text
    assert figures["decode_1_distinct_experts_per_layer_step"]["value"] == 8
    assert figures["decode_4_independent_experts_per_layer_step"]["value"] == pytest.approx(64 * (1 - (7 / 8) ** 4))


def test_a_policy_and_dtypes(main):
    one_case = {"benchmark.decode_batches": "(1,)", "benchmark.prefill_lengths": "()", "model.expert_dtype": "int8"}
    text, figures = main(**{"policy.spec": "topk:2", "model.dtype": "bfloat16", "benchmark.trace": ""}, **one_case)
    assert "in bfloat16 (at best" in text and "routing of random routers" in text
    assert figures["decode_1_distinct_experts_per_layer_step"]["value"] == 2
    architecture = gin.read_config(None, [f"{name}={value}" for name, value in TINY.items()]).architecture
    # eight tokens of prompt and one step to warm up, then six steps that are timed
    works = [roofline.work(architecture, roofline.Step([cached], [1], 2, 2), 2) for cached in range(9, 15)]
    saved = 2 * (3 * 32 * 16 - 4 * (2 * 16 + 32))  # two experts of one byte, and a scale for each output
    assert figures["decode_1_bytes"]["value"] == statistics.median(work.bytes for work in works) - saved
    assert figures["decode_1_flops"]["value"] == statistics.median(work.flops for work in works)


def test_a_checkpoint_reads_held_out_text(main, tmp_path):
    own = tiny_model.changed(decoder={"max_context": 64})
    folder = tiny_model.write_model(tmp_path / "model", own)
    shape = ("decoder.vocab_size", "decoder.d_model", "decoder.num_layers", "attention.num_heads")
    shape += ("attention.num_kv_heads", "attention.head_dim", "moe.expert_hidden", "decoder.max_context")
    defaults = gin.read_config(None)
    given = {name: getattr(getattr(defaults, name.split(".")[0]), name.split(".")[1]) for name in shape}
    text, figures = main(**given, **{"model.path": folder, "benchmark.decode_batches": "(1,)"})
    assert "routing the model's own, on held-out text" in text
    assert figures["decode_1_distinct_experts_per_layer_step"]["value"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy.spec": "topk:9"}, "policy 'topk:9': expected 1 to 8 experts"),
        ({"policy.k_max": 16}, "16 slots per token: expected at most the 8 of the recorded trace"),
        ({"moe.num_experts": 48}, "moe.num_experts = 48: expected a multiple of the 64 experts"),
        ({"benchmark.trace": "nowhere.npz"}, "benchmark.trace = 'nowhere.npz': no trace"),
        ({"benchmark.rounds": 30}, "take 100 tokens per row: expected at most the model's context, 64"),
        (
            {"benchmark.decode_batches": "()", "benchmark.prefill_lengths": "(64,)"},
            "benchmark.prefill_lengths: expected some below the model's context, 64",
        ),
        ({"model.path": "nowhere"}, "model.path = 'nowhere' does not exist"),
        ({"kernels.grouped_matmul": "fast"}, "kernels.grouped_matmul = 'fast'"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_measured(main, monkeypatch, settings, message):
    def refuse(*arguments):
        raise AssertionError("something was measured, or weights were made")

    from moe_jax.study import random_model

    monkeypatch.setattr(hardware, "Probe", refuse)
    monkeypatch.setattr(random_model, "random_params", refuse)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        main(**settings)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("benchmark.decode_batches=(0,)", r"benchmark.decode_batches = \(0,\): expected positive numbers"),
        ("benchmark.decode_batches=(8, 8)", "expected each number once"),
        ("benchmark.decode_batches=8", "expected a list, each item an integer"),
        ("benchmark.rounds=0", "benchmark.rounds = 0: expected a positive number"),
    ],
)
def test_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        gin.read_config(None, [setting])


def test_no_case_at_all_is_refused():
    with pytest.raises(ValueError, match="expected at least one case"):
        gin.read_config(None, ["benchmark.decode_batches=()", "benchmark.prefill_lengths=()"])


@pytest.mark.parametrize("name", ["benchmark_demo", "benchmark_olmoe"])
def test_the_shipped_configs_permit_their_cases(benchmark, name):
    config = gin.read_config(ROOT / "configs" / f"{name}.gin")
    max_context = 512 if config.model.path else config.decoder.max_context
    permitted, left_out = benchmark.cases_of(config.benchmark, max_context)
    assert (len(permitted), left_out) == (6, [])


@pytest.mark.processes
def test_what_each_dispatch_sends_is_counted_on_virtual_devices(tmp_path):
    """Two slots for each of 512 tokens send half of what four do, where the exchange follows them."""
    config = "--config=configs/benchmark_dispatch.gin"
    command_line = [sys.executable, "launch/benchmark.py", config, "--set=benchmark.dispatch_slots=(4, 2)", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command_line, f"--out={tmp_path}"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"]["count"] == 8
    rows = {name: figure["value"] for name, figure in result["figures"].items()}
    assert rows["tensor_4"] == rows["tensor_2"] == 14 == rows["replicated_4"] == rows["replicated_2"]
    choice_rows = (9 * 4 + 4) / (4 * 1024)  # of a token: an int32, a float32 and a bool of each slot, and the counts
    assert 14 < rows["all_gather_2"] < rows["all_gather_4"] < 14 + 8 * choice_rows
    assert rows["all_to_all_4"] <= 2 * 4 * 1.25 and rows["ragged_4"] <= 2 * 4
    assert rows["all_to_all_2"] == pytest.approx(rows["all_to_all_4"] / 2, rel=0.001)
    assert rows["ragged_2"] == pytest.approx(rows["ragged_4"] / 2, rel=0.02)
