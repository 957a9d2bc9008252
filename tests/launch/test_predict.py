"""launch/predict.py with the routing of a tiny model: its files, rows and figures, and what it refuses."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from tests import launcher_module, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "predict_v2_lite.gin"
SMALL = {
    **{"decoder.num_layers": 5, "predict.measured_config": "configs/models/deepseek_v2_lite.gin"},
    **{"predict.measured": '("assets/published/throughput_v2lite_active.csv",)', "predict.columns": '("k6",)'},
    **{"predict.policies": '("topk:4", "schedule:6,4,2,2", "opportunistic:2")', "predict.concurrencies": "(2, 8)"},
    **{"predict.max_rows": 8, "predict.loads": "(0.5,)", "predict.requests": 50},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    architecture = tiny_model.changed(moe={"num_experts": 32})  # two MoE layers stand in for one of 64 experts
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", architecture)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(16):
        (folder / f"{number}.txt").write_text(f"{number} foxes jump over {number} lazy dogs; " * (5 + number))
    return folder


def settings(model, text, **changed):
    changed = {name.replace("__", "."): value for name, value in changed.items()}
    return {**SMALL, "predict.routing": model, "text.held_out": text} | changed


def test_every_policy_has_a_row_at_every_load(model, text, tmp_path):
    printed = launcher_module.run_main("predict", settings(model, text), tmp_path, config=CONFIG)
    result = json.loads((tmp_path / "result.json").read_text())
    specs = ["model", "topk:4", "schedule:6,4,2,2", "opportunistic:2"]
    closed = {(row["policy"], row["concurrency"]): row["figures"] for row in result["rows"] if "concurrency" in row}
    opened = {(row["policy"], row["load"], row["variation"]): row["figures"] for row in result["rows"] if "load" in row}
    assert list(closed) == [(spec, clients) for clients in (2, 8) for spec in specs]
    assert list(opened) == [(spec, 0.5, variation) for variation in (1, 8) for spec in specs]
    assert closed["model", 8]["throughput_gain"]["value"] == 0
    assert closed["topk:4", 8]["throughput_gain"]["value"] > 0.05
    assert closed["topk:4", 8]["experts_per_token"]["value"] == pytest.approx(4)
    assert closed["opportunistic:2", 2]["distinct_experts_per_layer_step"]["value"] <= 4
    for figures in opened.values():
        seconds = [figures[f"whole_request_p{percent}"]["value"] for percent in (50, 90, 99)]
        assert 0 < figures["first_token_p50"]["value"] < seconds[0] <= seconds[1] <= seconds[2]
    figures = result["figures"]
    assert figures["throughput_v2lite_active_k4_median_error"]["value"] < 0.04
    assert figures["throughput_v2lite_active_k6_median_error"]["fitted"]
    assert figures["bandwidth"]["value"] == pytest.approx(1.6e12, rel=0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "config.gin", "predicted.md", "predicted.png"}
    assert f"routing of {model} stands in for the model's own" in printed and "| k6 (fitted) |" in printed


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"predict__columns": '("k9",)'}, "predict.columns = 'k9': expected one of k6, k5, k4, k3, k2"),
        ({"predict__columns": '("k6", "e64")'}, "one for each of 1 predict.measured"),
        (
            {"predict__measured": '("a/t.csv", "b/t.csv")', "predict__columns": '("k6", "k4")'},
            "predict.measured = ('a/t.csv', 'b/t.csv'): expected tables with different names",
        ),
        ({"predict__measured": '("nowhere.csv",)'}, "nowhere.csv"),
        ({"predict__measured": f'("{CONFIG}",)'}, "expected concurrency,k6,k4"),
        ({"predict__measured_config": "nowhere.gin"}, "nowhere.gin"),
        ({"predict__devices": 1, "predict__device_bytes_per_s": 1e11}, "of the peak"),
        ({"predict__policies": '("topk:65",)'}, "topk:65"),
        ({"predict__policies": '("schedule:6,4,2,4",)'}, "p = 4; expected a layer between"),
        ({"predict__policies": '("reroute:2,0.1",)'}, "policy.calibration"),
        ({"predict__max_rows": 9}, "predict.concurrencies = (2, 8): expected one of at least predict.max_rows = 9"),
        ({"predict__loads": "(0.0,)"}, "predict.loads = (0.0,): expected positive numbers"),
        ({"predict__output_tokens": 1}, "predict.output_tokens = 1: expected 2 or more"),
        ({"moe__num_experts": 24}, "of the 32 experts"),
        ({"predict__routing": "nowhere"}, "nowhere"),
        ({"text__held_out": "nowhere"}, "nowhere"),
    ],
)
def test_refusals_are_one_line(model, text, tmp_path, changed, expected):
    with pytest.raises((ValueError, OSError), match=re.escape(expected)) as refusal:
        launcher_module.run_main("predict", settings(model, text, **changed), tmp_path, config=CONFIG)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.processes
def test_a_refusal_ends_with_status_two(tmp_path):
    launch = [sys.executable, str(ROOT / "launch" / "predict.py"), f"--out={tmp_path / 'out'}"]
    done = subprocess.run(
        [*launch, "--set=predict.measured=('none.csv','x')"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "none.csv" in done.stderr
