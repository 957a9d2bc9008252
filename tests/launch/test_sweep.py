"""launch/sweep.py on a tiny model and real held-out text: its points, files and error messages, and resuming."""

import csv
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax import checkpoint
from moe_jax.evaluation import concurrent
from moe_jax.study import surgery
from tests import launcher_module, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
POLICIES = ("topk:8", "topk:3", "mass:0.7", "opportunistic:2", "reroute:2,0.1")
SMALL = {
    **{"sweep.timed_config": "", "model.dtype": "auto", "sweep.policies": json.dumps(POLICIES)},
    **{"sweep.windows": 16, "sweep.context": 24, "sweep.concurrencies": "(1, 4)"},
    **{"sweep.rounds": 2, "sweep.steps": 1, "sweep.cached_tokens": 4, "evaluation.documents": 6},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")
    calibrate = [sys.executable, str(ROOT / "launch" / "calibrate.py"), f"--set=model.path={folder}"]
    done = subprocess.run(
        [*calibrate, f"--out={folder.parent / 'out'}", '--set=text.sources=("absl-py",)'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder.parent / "out" / "calibration.npz").rename(folder / "calibration.npz")
    return folder


def command_line(model, out, *arguments):
    launch = [sys.executable, str(ROOT / "launch" / "sweep.py"), f"--set=model.path={model}", f"--out={out}"]
    return [*launch, *(f"--set={name}={value}" for name, value in SMALL.items()), *arguments]


def sweep(model, out, *arguments):
    """As a user runs it."""
    return subprocess.run(command_line(model, out, *arguments), capture_output=True, text=True, cwd=ROOT)


def assert_refused(model, out, expected, **settings):
    """In this process: a line that says what was expected, before anything is written."""
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    with pytest.raises(ValueError, match=re.escape(expected)) as refusal:
        launcher_module.run_main("sweep", {**SMALL, "model.path": model, **settings}, out)
    assert "\n" not in str(refusal.value) and not out.exists()


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "whole"
    done = sweep(model, out)
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.mark.processes
def test_every_policy_has_a_point_at_every_concurrency(done):
    printed, out = done
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [(row["concurrency"], row["policy"]) for row in rows] == [
        (concurrency, spec) for concurrency in (1, 4) for spec in ("model", *POLICIES)
    ]
    figures = {(row["policy"], row["concurrency"]): row["figures"] for row in rows}
    assert figures["topk:8", 4]["bits_per_byte_increase"] == {"value": 0, "unit": "1", "ci95": [0, 0]}
    assert figures["topk:3", 4]["experts_per_token"]["value"] == 3
    assert figures["opportunistic:2", 1]["experts_per_token"]["value"] == 2
    assert figures["opportunistic:2", 4]["experts_per_token"]["value"] > 4
    assert 3 < figures["topk:3", 4]["distinct_experts_per_layer_step"]["value"] <= 12
    assert figures["topk:3", 4]["bytes"]["value"] < figures["model", 4]["bytes"]["value"]
    drawn = {f"frontier.{suffix}" for suffix in ("csv", "html", "png")}
    assert {path.name for path in out.iterdir()} == {"result.json", "config.gin", *drawn}
    assert "opportunistic:2" in (out / "frontier.html").read_text() and "| 4 | 0.5% |" in printed.stdout


@pytest.mark.processes
def test_a_rival_runs_as_many_distinct_experts(done):
    with open(done[1] / "frontier.csv", newline="") as file:
        points = {(row["policy"], row["concurrency"]): row for row in csv.DictReader(file)}
    point = points["opportunistic:2", "4"]
    rival = points[point["rival"], "4"]
    assert rival["policy"] in ("model", "topk:8", "topk:3")
    assert float(rival["distinct_experts_quality"]) >= float(point["distinct_experts_quality"])
    ratio = float(point["bits_per_byte"]) / float(rival["bits_per_byte"]) - 1
    assert float(point["over_rival"]) == pytest.approx(ratio, abs=1e-9)
    assert points["topk:3", "4"]["rival"] == ""


@pytest.mark.processes
def test_a_killed_sweep_resumes(model, done, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command_line(model, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 300
    while len(kept := sorted((out / "parts").rglob("*.npz"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in kept}
    process = subprocess.Popen(command_line(model, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    seen = {}
    while process.poll() is None:
        seen |= {path: path.stat().st_mtime_ns for path in kept if path.exists()}
        time.sleep(0.02)
    assert seen == before
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()

    def qualities(folder):
        with open(folder / "frontier.csv", newline="") as file:
            return [[row["policy"], row["bits_per_byte"], row["increase_low"]] for row in csv.DictReader(file)]

    assert qualities(out) == qualities(done[1])
    assert not (out / "parts").exists()


@pytest.mark.processes
def test_speed_of_another_shape(model, tmp_path):
    shape = tmp_path / "shape.gin"
    lines = ["decoder.num_layers = 2", "decoder.num_dense_layers = 0", "decoder.d_model = 32", "moe.num_experts = 16"]
    shape.write_text("\n".join([*lines, "moe.k = 8", "attention.head_dim = 16", "decoder.vocab_size = 64"]))
    done = sweep(
        model, tmp_path / "out", f"--set=sweep.timed_config={shape}", '--set=sweep.policies=("model","topk:2")'
    )
    assert done.returncode == 0, done.stderr
    assert "random weights in the shape of" in (tmp_path / "out" / "frontier.html").read_text()
    shape.write_text("\n".join(line.replace("16", "8") for line in lines))
    assert_refused(model, tmp_path / "none", "moe.num_experts = 8; expected 16", sweep__timed_config=shape)


@pytest.mark.processes
def test_a_tuned_model_is_compared_with_all_experts_of_the_original(model, done, tmp_path):
    fewer = tiny_model.changed(moe={"k": 4})
    tuned = tiny_model.write_model(tmp_path / "tuned", fewer, tiny_model.random_params(seed=1))
    policies = '--set=sweep.policies=("topk:4", "topk:8")'
    compared = sweep(tuned, tmp_path / "out", f"--set=sweep.original={model}", policies)
    assert compared.returncode == 0, compared.stderr

    def bits(folder):
        rows = json.loads((folder / "result.json").read_text())["rows"]
        return {row["policy"]: row["figures"] for row in rows if row["concurrency"] == 4}

    found, alone = bits(tmp_path / "out"), bits(done[1])
    assert found["model"]["bits_per_byte"] == alone["model"]["bits_per_byte"]
    assert [found[policy]["experts_per_token"]["value"] for policy in found] == [8, 4, 8]
    for policy in ("topk:4", "topk:8"):
        ratio = found[policy]["bits_per_byte"]["value"] / found["model"]["bits_per_byte"]["value"] - 1
        assert ratio != 0 and found[policy]["bits_per_byte_increase"]["value"] == pytest.approx(ratio, abs=1e-9)


@pytest.fixture(scope="module")
def pruned(model, tmp_path_factory):
    """The model with 10 of 16 experts, and with other numbers in its two layers."""
    whole, folder = checkpoint.open(model), tmp_path_factory.mktemp("pruned")
    for name, sizes in (("uniform_10", (10, 10)), ("across", (9, 12))):
        kept = [np.arange(size) for size in sizes]
        smaller = whole.for_new_weights().with_architecture(surgery.architecture_of(whole.architecture, kept))
        smaller.save(folder / name, surgery.without_others(whole.read(), whole.architecture, kept))
    return folder


@pytest.mark.processes
def test_pruned_models_are_on_the_same_frontier(model, pruned, done, tmp_path, capsys):
    """Quality first, in a call of its own; then the timing, which reads as many experts as they have."""
    folders = json.dumps((str(pruned / "uniform_10"), str(pruned / "across")))
    settings = {**SMALL, "model.path": model, "sweep.pruned": folders, "sweep.policies": '("topk:3",)'}
    out = tmp_path / "out"
    out.mkdir()
    launcher_module.run_main("sweep", settings, out, "--quality_only")
    assert "without --quality_only goes on" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["parts"]
    with pytest.MonkeyPatch.context() as patched:  # what is known is not measured again
        patched.setattr(concurrent, "score_windows", None)
        printed = launcher_module.run_main("sweep", settings, out)
    rows = {(row["policy"], row["concurrency"]): row["figures"] for row in result_rows(out)}
    assert [name for name, rows_ in rows if rows_ == 4] == ["model", "topk:3", "pruned:uniform_10", "pruned:across"]
    full, small, unlike = (rows[name, 4] for name in ("model", "pruned:uniform_10", "pruned:across"))
    assert full["bits_per_byte"] == next(
        row["figures"]["bits_per_byte"] for row in result_rows(done[1]) if row["policy"] == "model"
    )
    assert small["bits_per_byte"]["value"] != full["bits_per_byte"]["value"]
    assert small["experts_per_token"]["value"] == full["experts_per_token"]["value"] == 8
    for figures, most in ((small, 10), (unlike, 10.5), (full, 16)):
        assert 8 < figures["distinct_experts_per_layer_step"]["value"] <= most
    expert_bytes = 4 * 3 * 24 * 64
    assert full["weights_bytes"]["value"] - small["weights_bytes"]["value"] == 2 * 6 * (expert_bytes + 4 * 65)
    assert full["weights_bytes"]["value"] - unlike["weights_bytes"]["value"] == (7 + 4) * (expert_bytes + 4 * 65)
    assert full["bytes"]["value"] > small["bytes"]["value"]
    assert "| `pruned:uniform_10` |" in printed and " MB | " in printed
    page = (out / "frontier.html").read_text()
    assert "pruned:uniform_10" in page and "Pruned models" in page


def result_rows(out):
    return json.loads((out / "result.json").read_text())["rows"]


def test_what_is_no_pruned_model_of_the_swept_one_is_refused(model, pruned, tmp_path):
    refused = [
        ("assets/demo", "sweep.pruned: assets/demo: MoE layers = 5; expected 2"),
        (tiny_model.write_model(tmp_path / "k", tiny_model.changed(moe={"k": 4})), "moe.k = (4, 4); expected (8, 8)"),
        (tiny_model.write_model(tmp_path / "e", tiny_model.changed(moe={"num_experts": 17})), "expected at most (16,"),
    ]
    for folder, says in refused:
        assert_refused(model, tmp_path / "out", says, sweep__pruned=json.dumps((str(folder),)))
    twice = json.dumps((str(pruned / "across"), str(tmp_path / "across" / "model")))
    assert_refused(model, tmp_path / "out", "expected folders with different names", sweep__pruned=twice)


def test_an_original_of_another_tokenizer_is_refused(model, tmp_path):
    expected = "sweep.original: MoE layers = 5; expected 2"
    assert_refused(model, tmp_path / "out", expected, sweep__original="assets/demo")
    other = tiny_model.write_model(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert (other / "tokenizer.json").read_text() != text
    expected = "expected a model with the tokenizer of model.path"
    assert_refused(model, tmp_path / "out", expected, sweep__original=other)


def test_a_calibration_of_another_model_is_refused(model, tmp_path):
    other = tiny_model.write_model(tmp_path / "other", params=tiny_model.random_params(seed=1))
    calibration = model / "calibration.npz"
    assert_refused(other, tmp_path / "out", "policy.calibration is of another model", policy__calibration=calibration)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('sweep.policies=("topk:2","oportunistic:3")', 'did you mean "opportunistic:3"'),
        ('sweep.policies=("layers:8,8,8",)', "3 layers; expected one number for each of the model's 2"),
        ("sweep.policies=()", "at least one policy"),
        ("sweep.windows=10", "a multiple of the 16 rows"),
        ("sweep.windows=100000", "full windows of 24 tokens: expected at least 100000"),
        ("sweep.context=64", "sweep.context = 64: expected at most 32"),
        ("sweep.timed_config=nowhere.gin", "nowhere.gin"),
        ("sweep.cached_tokens=31", "sweep.cached_tokens = 31: expected at most 30"),
        ("policy.calibration=assets/demo/calibration.npz", "other layers or experts"),
        ("policy.calibration=README.md", "no calibration"),
    ],
)
def test_refusals(model, tmp_path, argument, message):
    name, _, value = argument.partition("=")
    assert_refused(model, tmp_path / "out", message, **{name: value})


def test_a_refusal_is_one_line_and_leaves_no_folder(model, tmp_path):
    done = sweep(model, tmp_path / "out", "--set=sweep.windows=10")
    assert done.returncode == 2 and "a multiple of the 16 rows" in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "out").exists()
