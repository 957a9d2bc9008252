"""launch/evaluate.py on a tiny model and real held-out text: its table, files and error messages, and resuming."""

import csv
import json
import pathlib
import re
import subprocess
import sys

import pytest

from tests import launcher_module, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    **{"evaluation.policies": '("topk:8","model","topk:2")', "evaluation.documents": 4},
    **{"evaluation.choice_questions": 8, "evaluation.completion_headers": 6},
    **{"evaluation.completion_tokens": 8, "evaluation.batch_size": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    architecture = tiny_model.changed(decoder={"max_context": 256})
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", architecture)


def evaluate(model, out, *arguments):
    launch = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"--set=model.path={model}", f"--out={out}"]
    small = [f"--set={name}={value}" for name, value in SMALL.items()]
    return subprocess.run([*launch, *small, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "whole"
    done = evaluate(model, out)
    assert done.returncode == 0, done.stderr
    return done, out


def test_one_row_per_policy_compared_with_the_first(done):
    printed, out = done
    result = json.loads((out / "result.json").read_text())
    first, same, few = (row["figures"] for row in result["rows"])
    assert [row["policy"] for row in result["rows"]] == ["topk:8", "model", "topk:2"]
    assert result["figures"].items() >= first.items() and result["figures"]["xz_bits_per_byte"]["value"] > 0
    names = {"bits_per_byte", "choice_accuracy", "completion_parse_rate", "expert_load_max_over_mean", "kl_to_full"}
    assert names | {"completion_parse_rate_sampled", "unused_experts"} == set(first)
    assert all(same[name] == first[name] for name in first)
    assert same["bits_per_byte_increase"]["ci95"] == [0, 0] and same["kl_to_full"]["value"] == 0
    assert few["kl_to_full"]["ci95"][0] > 0
    assert len([line for line in printed.stdout.splitlines() if line.startswith("| `")]) == 3
    assert {path.name for path in out.iterdir()} == {"result.json", "config.gin", "documents.csv", "expert_load.csv"}


def test_details_add_up_to_the_table(done):
    _, out = done
    rows = json.loads((out / "result.json").read_text())["rows"]
    with open(out / "documents.csv", newline="") as file:
        documents = list(csv.DictReader(file))
    with open(out / "expert_load.csv", newline="") as file:
        _, *loads = csv.reader(file)
    assert len(documents) == 4 and len(loads) == 3 * 2
    for row in rows:
        bits = sum(float(one[row["policy"]]) for one in documents) / sum(int(one["bytes"]) for one in documents)
        assert bits == pytest.approx(row["figures"]["bits_per_byte"]["value"], abs=1e-6)
        slots_LE = [[int(slots) for slots in slots_E] for spec, _, *slots_E in loads if spec == row["policy"]]
        uneven = max(max(load) * len(load) / sum(load) for load in slots_LE)
        assert uneven == pytest.approx(row["figures"]["expert_load_max_over_mean"]["value"])


def test_a_short_text_that_is_no_python_has_likelihoods_alone(model, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / f"{name}.txt").write_text(f"Chapter {name}: it was a dark night. " * 20)
    config = ROOT / "configs" / "evaluate_model.gin"
    printed = launcher_module.run_main(
        "evaluate", {"model.path": model, "text.held_out": text}, tmp_path, config=config
    )
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["model", "topk:6", "topk:4", "topk:2"]
    figures = {"bits_per_byte", "kl_to_full", "expert_load_max_over_mean", "unused_experts", "bits_per_byte_increase"}
    assert set(rows[-1]["figures"]) == figures and rows[-1]["figures"]["kl_to_full"]["value"] > 0
    assert "| policy | bits per byte | increase, paired | KL to full | max/mean load |" in printed


def test_experts_in_several_dtypes_side_by_side(model, tmp_path):
    settings = {**SMALL, "evaluation.policies": '("model",)', "evaluation.expert_dtypes": '("int8",)'}
    settings |= {"model.path": model, "evaluation.choice_questions": 0, "evaluation.completion_headers": 0}
    launcher_module.run_main("evaluate", settings, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["implementations"]["expert_dtype"] == "auto, int8"
    (_, wide), (name, narrow) = ((row["policy"], row["figures"]) for row in result["rows"])
    assert name == "model, experts in int8"
    change = narrow["bits_per_byte"]["value"] / wide["bits_per_byte"]["value"] - 1
    assert 0 < abs(change) < 0.003 and narrow["bits_per_byte_increase"]["value"] == pytest.approx(change)
    with open(tmp_path / "documents.csv", newline="") as file:
        assert {"model", name} < {*csv.DictReader(file).fieldnames}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ('evaluation.policies=("topk:9",)', "expected 1 to 8 experts"),
        ('evaluation.policies=("model","budget:4")', "'budget:4', which looks at all rows of a decode step"),
        (
            "evaluation.choice_questions=100000",
            "next-line questions: expected 100000; with evaluation.choice_questions=",
        ),
        ("evaluation.completion_headers=100000", "headers of functions: expected 100000"),
        (
            "evaluation.completion_tokens=200",
            "context is 256 tokens: expected at least 328, or evaluation.completion_headers=0",
        ),
        ("text.held_out=nowhere", "nowhere"),
    ],
)
def test_refusals_are_one_line(model, tmp_path, setting, expected):
    name, _, value = setting.partition("=")
    with pytest.raises(ValueError, match=re.escape(expected)) as refusal:
        launcher_module.run_main("evaluate", {**SMALL, "model.path": model, name: value}, tmp_path)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_a_refusal_leaves_no_folder(model, tmp_path):
    done = evaluate(model, tmp_path / "out", "--set=text.held_out=nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
