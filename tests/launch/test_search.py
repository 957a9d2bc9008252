"""launch/search.py on a tiny model: its rows and files, what other launchers take, refusals, and resuming."""

import csv
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.config import gin
from moe_jax.evaluation.divergence import score_together
from moe_jax.study import schedule_search
from tests import launcher_module, tiny_model, tiny_training

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "search_demo.gin"
BUDGETS = (3, 2.25)
SMALL = {"search.budgets": BUDGETS, "search.windows": 5, "search.context": 24, "search.held_out_windows": 6}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A model of four MoE layers, and texts."""
    architecture = tiny_model.changed(decoder={"num_layers": 5}, moe={"k": 4})
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_model.write_model(folder / "model", architecture)
    sources = tiny_training.write_sources(folder / "text")
    texts = {"text.sources": f'("{sources / "train"}",)', "text.held_out": sources / "held_out"}
    return {"model.path": model, **texts, **SMALL, "search.rivals": 3}


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    printed = launcher_module.run_main("search", settings, out, config=CONFIG)
    return out, printed, json.loads((out / "result.json").read_text())


def by_role(result, budget):
    return {row["role"]: row for row in result["rows"] if row["budget"] == budget and row["role"] != "found"}


def test_every_budget_has_its_rows_and_a_schedule_of_its_mean(done):
    out, printed, result = done
    assert {path.name for path in out.iterdir()} == {"result.json", "config.gin", "searched.md", "costs.csv"}
    for budget in BUDGETS:
        rows = by_role(result, budget)
        whole = ["uniform"] if budget == 3 else []
        assert list(rows) == ["searched", "linear", "oracle", "plain", "lexi", *whole]
        k_L = [int(k) for k in re.findall(r"\d", rows["searched"]["policy"])]
        assert rows["searched"]["policy"].startswith("layers:") and sum(k_L) == 4 * budget and len(k_L) == 4
        assert all(
            row["policy"].startswith("schedule:") for name, row in rows.items() if name in ("linear", "oracle", "plain")
        )
        bits = {role: row["figures"]["bits_per_byte"]["value"] for role, row in rows.items()}
        assert bits["oracle"] <= bits["linear"]
        for role in list(rows)[1:]:
            difference = rows[role]["figures"]["searched_over_this"]
            assert difference["value"] == pytest.approx(bits["searched"] / bits[role] - 1)
            assert difference["ci95"][0] <= difference["value"] <= difference["ci95"][1]
        found = [row for row in result["rows"] if row["budget"] == budget and row["role"] == "found"]
        costs = [row["figures"]["calibration_kl"]["value"] for row in found]
        assert len(found) == 2 and costs == sorted(costs) and found[0]["policy"] == rows["searched"]["policy"]
        assert all(costs[0] <= row["figures"]["calibration_kl"]["value"] for row in rows.values())
        assert f"| {budget:g} | `{found[0]['policy']}` |" in printed
    with open(out / "costs.csv", newline="") as file:
        costs = list(csv.DictReader(file))
    assert [(int(row["moe_layer"]), int(row["k"])) for row in costs] == [
        (layer, k) for layer in range(4) for k in (1, 2, 3, 4)
    ]
    assert all((float(row["kl"]) == 0) == (float(row["lexi"]) == 0) == (row["k"] == "4") for row in costs)


def test_what_was_found_is_what_the_sweep_takes(done, settings, tmp_path):
    out, printed, result = done
    found = tuple(by_role(result, budget)["searched"]["policy"] for budget in BUDGETS)
    config = gin.read_config(out / "config.gin")
    assert config.sweep.policies == ("model", *found)
    [flag] = re.findall(r"--set '(sweep\.policies=.*)'", printed)
    assert gin.read_config(None, [flag]).sweep.policies == ("model", *found)
    small = {"sweep.windows": 16, "sweep.context": 16, "sweep.concurrencies": "(1,)", "sweep.rounds": 1}
    swept = {"sweep.steps": 1, "sweep.cached_tokens": 4, **small}
    launcher_module.run_main("sweep", swept, tmp_path, config=out / "config.gin")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["figures"]["experts_per_token"]["value"] for row in rows] == [4, *map(pytest.approx, BUDGETS)]


def test_without_rivals_only_the_search_is_measured(settings, done, tmp_path):
    fewer = {**settings, "search.rivals": 0, "search.budgets": (2.25,)}
    printed = launcher_module.run_main("search", fewer, tmp_path, config=CONFIG)
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(by_role(result, 2.25)) == ["searched", "lexi"] and "| none | none | none |" in printed
    for role in ("searched", "lexi"):
        assert by_role(result, 2.25)[role]["policy"] == by_role(done[2], 2.25)[role]["policy"]
    assert result["figures"]["lexi_rank_of_schedules_2.25"]["value"] is None


def test_what_was_measured_on_another_text_is_not_used(settings, tmp_path):
    """Interrupted, and started again after a source file has changed: as if it had never run."""
    sources = tmp_path / "text"
    shutil.copytree(pathlib.Path(settings["text.held_out"]).parent / "train", sources)
    own = {**settings, "search.rivals": 0, "search.budgets": (2.25,), "text.sources": f'("{sources}",)'}
    (tmp_path / "resumed").mkdir(), (tmp_path / "fresh").mkdir()
    scored = []

    def interrupted(*arguments):
        if scored:
            raise KeyboardInterrupt
        scored.append(score_together(*arguments))
        return scored[0]

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(schedule_search, "score_together", interrupted)
        launcher_module.run_main("search", own, tmp_path / "resumed", config=CONFIG)
    assert len(list((tmp_path / "resumed" / "parts").rglob("*.npz"))) == 1
    for path in sorted(sources.rglob("*.py")):
        path.write_text(path.read_text().replace("def ", "def other_"))
    for name in ("resumed", "fresh"):
        launcher_module.run_main("search", own, tmp_path / name, config=CONFIG)
    resumed, fresh = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("resumed", "fresh"))
    assert resumed["rows"] == fresh["rows"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"search__budgets": (0.5,)}, "search.budgets = (0.5,): expected numbers of at least 1"),
        ({"search__budgets": (2, 5)}, "search.budgets: 5: expected 1 to 4, the mean of the model's own k"),
        ({"search__budgets": (2.1,)}, "search.budgets: 2.1: expected a mean of 4 whole numbers, such as 2 or 2.25"),
        ({"search__budgets": (2, 2)}, "search.budgets = (2.0, 2.0): expected each budget once"),
        ({"search__budgets": ()}, "search.budgets = (): expected at least one budget"),
        ({"policy__k_max": 2}, "policy.k_max = 2: expected 0, schedules keep at most the model's own k"),
        ({"search__rivals": -1}, "search.rivals = -1: expected 0 (none) or more"),
        ({"search__context": 33}, "search.context = 33: expected at most 32"),
        ({"search__windows": 10**6}, "text.sources has"),
        ({"search__windows": 10**6}, "name more text, or lower search.windows or search.context"),
        ({"search__held_out_windows": 10**6}, "or lower search.held_out_windows or search.context"),
        ({"text__sources": '("nowhere",)'}, "nowhere"),
        ({"text__held_out": "nowhere"}, "nowhere"),
        ({"model__path": "nowhere"}, "nowhere"),
    ],
)
def test_refusals_are_one_line(settings, tmp_path, changed, expected):
    changed = {name.replace("__", "."): value for name, value in changed.items()}
    with pytest.raises((ValueError, OSError), match=re.escape(expected)) as refusal:
        launcher_module.run_main("search", {**settings, **changed}, tmp_path, config=CONFIG)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_a_budget_that_a_layer_with_fewer_experts_forbids_is_refused(settings, tmp_path):
    moe = {"k": 4, "k_of_layers": (4, 2), "num_experts_of_layers": (16, 2)}
    model = tiny_model.write_model(tmp_path / "model", tiny_model.changed(moe=moe))
    with pytest.raises(ValueError, match=re.escape("3.5: expected 1 to 3, the mean of the model's own k over its 2")):
        launcher_module.run_main("search", {**settings, "model.path": model, "search.budgets": (3.5,)}, tmp_path)


@pytest.mark.processes
def test_a_killed_search_resumes_and_a_refusal_ends_with_status_two(settings, done, tmp_path):
    flags = [f"--set={name}={value}" for name, value in settings.items()]
    launch = [
        sys.executable,
        str(ROOT / "launch" / "search.py"),
        f"--config={CONFIG}",
        f"--out={tmp_path / 'out'}",
        *flags,
    ]
    refused = subprocess.run([*launch, "--set=search.budgets=(9,)"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and refused.stderr.startswith("error: search.budgets: 9") and not refused.stdout
    assert refused.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 300
    while len(kept := sorted((tmp_path / "out" / "parts").rglob("*.npz"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in kept}
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    seen = {}
    while process.poll() is None:
        seen |= {path: path.stat().st_mtime_ns for path in kept if path.exists()}
        time.sleep(0.02)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert seen == before and not (tmp_path / "out" / "parts").exists()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["rows"] == done[2]["rows"] and result["figures"] == done[2]["figures"]
