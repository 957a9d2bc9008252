"""launch/harness.py on a tiny model: its table, files and error messages, most with the harness installed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import tiny_model

ROOT = pathlib.Path(__file__).parents[2]
LAUNCHER = str(ROOT / "launch" / "harness.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    architecture = tiny_model.changed(decoder={"max_context": 128})
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", architecture)


def harness(model, out, *arguments, program=(LAUNCHER,)):
    launch = [sys.executable, *program, f"--set=model.path={model}", f"--out={out}"]
    return subprocess.run([*launch, *arguments], capture_output=True, text=True)


def assert_refused(done, out, expected):
    assert done.returncode == 2 and expected in done.stderr and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not out.exists()


WITHOUT = f"""
import runpy, sys
sys.modules["lm_eval"] = None
sys.argv[0] = {LAUNCHER!r}
runpy.run_path({LAUNCHER!r}, run_name="__main__")
"""


@pytest.mark.skipif(os.name != "posix", reason="starts itself over on Linux alone")
def test_without_the_harness_the_error_says_what_to_install(model, tmp_path):
    out = tmp_path / "out"
    done = harness(model, out, "--tasks=held_out_bits", program=("-c", WITHOUT))
    assert_refused(done, out, 'lm-eval is not installed: pip install "lm-eval>=')


def test_the_install_command_is_that_of_the_requirements():
    source = (ROOT / "launch" / "harness.py").read_text()  # two launchers cannot be imported: both define --chat
    [requirement] = re.findall(r"^INSTALL = 'pip install \"(.*)\"'$", source, re.MULTILINE)
    assert requirement in (ROOT / "requirements-peers.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--tasks: expected at least one name"),
        (("--tasks=held_out_bits", "--limit=0"), "--limit=0"),
        (("--tasks=held_out_bits", "--num_fewshot=-1"), "--num_fewshot=-1"),
    ],
)
def test_refusals_of_flags(model, tmp_path, arguments, expected):
    assert_refused(harness(model, tmp_path / "out", *arguments), tmp_path / "out", expected)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tasks=held_out_bit",), 'did you mean "held_out_bits"?'),
        (("--tasks=held_out_bits,qqqqq",), "--tasks: 'qqqqq' is not a task of lm-eval"),
        (("--tasks=held_out_bits", "--include=nowhere"), "--include = 'nowhere': expected a folder of tasks"),
        (("--tasks=held_out_bits", '--set=evaluation.policies=("topk:9",)'), "expected 1 to 8 experts"),
        (("--tasks=held_out_bits", '--set=evaluation.policies=("model","tokp:2")'), "policy 'tokp:2'"),
        (("--tasks=held_out_bits", "--chat"), "has no chat template"),
        (("--tasks=held_out_bits", "--set=model.path=nowhere"), "nowhere"),
        (("--tasks=long_answer", "--include={tasks}"), "max_gen_toks = 128: expected fewer than the model's context"),
    ],
)
def test_refusals(model, tmp_path, arguments, expected):
    write_tasks(tmp_path / "tasks")
    arguments = [one.format(tasks=tmp_path / "tasks") for one in arguments]
    assert_refused(harness(model, tmp_path / "out", *arguments), tmp_path / "out", expected)


def write_tasks(folder):
    """Custom tasks, as the harness documents them: JSON lines, a group, and examples in the prompt."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps({"a": a, "b": a + 1}) + "\n" for a in range(9)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'data.jsonl'}\ntest_split: test\n"
    (folder / "choose.yaml").write_text(
        f"task: choose\n{data}output_type: multiple_choice\nfewshot_split: test\nnum_fewshot: 2\n"
        'doc_to_text: "{{a}} + 1 ="\ndoc_to_choice: ["0", "1", "2", "3"]\ndoc_to_target: "{{b % 4}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    answer = (
        f'{data}output_type: generate_until\ndoc_to_text: "{{{{a}}}} + 1 ="\ndoc_to_target: "{{{{b}}}}"\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    for name, count in (("answer", 4), ("long_answer", 128)):
        generation = f'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: {count}\n'
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{answer}{generation}")
    (folder / "both.yaml").write_text("group: both\ntask:\n  - choose\n  - answer\n")


@pytest.mark.peers
def test_one_row_per_policy(model, tmp_path):
    """A custom group and a bundled task; the same policy twice gives the same results, with examples in the prompts."""
    write_tasks(tmp_path / "tasks")
    out = tmp_path / "out"
    policies = '--set=evaluation.policies=("model","topk:8","topk:1")'
    asked = ("--tasks=both,held_out_bits", f"--include={tmp_path / 'tasks'}", "--limit=5", policies)
    done = harness(model, out, *asked)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    first, same, few = (row["figures"] for row in result["rows"])
    assert [row["policy"] for row in result["rows"]] == ["model", "topk:8", "topk:1"] and result["figures"] == first
    names = {"choose/acc", "answer/exact_match", "held_out_bits/bits_per_byte"}
    counts = {f"{name}/documents": {"value": 5, "unit": "documents"} for name in ("choose", "answer", "held_out_bits")}
    assert set(first) == names | set(counts) | {"truncated_contexts"} and first.items() >= counts.items()
    assert result["implementations"]["tasks"].startswith("lm-eval 0.4.")
    assert set(few) == set(first) | {f"{name}_difference" for name in names}
    assert {name: same[name] for name in first} == first
    assert first["held_out_bits/bits_per_byte"] != few["held_out_bits/bits_per_byte"]
    assert {path.name for path in out.iterdir()} == {"result.json", "config.gin", "samples.jsonl"}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * (5 + 5 + 5)
    right = [one["acc"] for one in samples if (one["policy"], one["task"]) == ("topk:1", "choose")]
    assert sum(right) / 5 == few["choose/acc"]["value"]
    assert "| choose/acc | " in done.stdout and done.stderr == ""
