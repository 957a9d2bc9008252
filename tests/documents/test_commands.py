"""Every command that a document, a config or a launcher states: those that take seconds run, the others are read.

A command that is not run is read as its launcher would: the script exists, each flag is one of its own, `--config` is a
file that parses, each `--set` is a setting of the schema, each policy parses.
"""

import itertools
import json
import keyword
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import packaging.requirements
import pytest

from tests.documents import written
from tests.documents.written import ROOT

COMMANDS = written.commands()
QUICK = ("launch/infer.py", "launch/convert.py")  # scripts whose commands run, if all their inputs exist
# Why a script's commands do not run here. A script in neither table makes a test fail.
NOT_RUN = {
    "launch/benchmark.py": "times steps for a minute or more",
    "launch/calibrate.py": "reads text for half a minute; tests/study/test_calibrate.py has a small model",
    "launch/compile.py": "needs libtpu, or nvcc; tests/mesh/on_eight_devices/test_compile.py has a small model",
    "launch/evaluate.py": "takes eleven minutes",
    "launch/finetune.py": "takes half an hour",
    "launch/harness.py": "needs lm-eval, which is not in requirements-dev.txt",
    "launch/predict.py": "takes minutes",
    "launch/prune.py": "takes half an hour; tests/launch/test_prune.py has a small model",
    "launch/search.py": "takes half an hour; tests/launch/test_search.py has a small model",
    "launch/sweep.py": "takes half an hour",
    "launch/train.py": "takes an hour and a half",
    "benchmarks/compile_matrix.py": "needs libtpu, or nvcc, and an hour",
    "benchmarks/compile_checked.py": "needs 15 GB of memory",
    "benchmarks/grouped_matmul.py": "needs 4 GB of memory",
    "benchmarks/kernel_table.py": "reads what a GPU wrote",
    "benchmarks/kernels.py": "needs a GPU",
    "benchmarks/loading.py": "needs 16 GB of memory",
    "benchmarks/loads.py": "needs a GPU; tests/study/test_loads.py has a small model",
    "benchmarks/loads_chart.py": "reads what a GPU wrote",
    "benchmarks/long_prompts.py": "needs transformers",
    "benchmarks/on_device.sh": "needs a GPU",
    "benchmarks/peers.py": "needs llama.cpp and transformers",
    "benchmarks/real_weights.py": "needs transformers and a network",
    "benchmarks/recovery.py": "takes hours",
    "benchmarks/traffic.py": "counts for a minute or more",
    "benchmarks/stacked.py": "needs 24 GB of memory",
    "benchmarks/uneven_prompts.py": "takes minutes",
    "benchmarks/whole_steps.sh": "needs a GPU",
    "assets/text/choose.py": "refuses where its archive is, as here",
    "assets/traces/record.py": "overwrites an asset",
    "-m": "the whole suite",  # python -m pytest
}
NOT_HERE = {
    r"\b[A-Z]{3,}\b": "a placeholder",
    r"=\w[\w-]*/[\w.-]*-\d": "a model on a hub",
    r"=out/": "what another command writes",
}


def script_of(words):
    """The script that a command runs, or its program."""
    return words[1] if words[0] in ("python", "bash") else words[0]


def reason_not_to_run(pipeline):
    """Why the commands of a pipeline are only read; "" if they run, None if the script is in neither table."""
    script = script_of(pipeline[-1])
    if script == "pip":
        return "changes the environment"
    if script not in QUICK:
        return NOT_RUN.get(script)
    text = " ".join(word for words in pipeline for word in words if not word.startswith("--out"))
    return next((reason for pattern, reason in NOT_HERE.items() if re.search(pattern, text)), "")


PIPELINES = [
    (command, text, words)
    for command in COMMANDS
    for text, words in zip(re.split(r" && ", command.text), command.pipelines, strict=True)
]
RUN = {text: command.where for command, text, words in PIPELINES if reason_not_to_run(words) == ""}


def test_each_command_is_run_or_is_read_for_a_reason():
    undecided = [f"{command.where}: {text}" for command, text, words in PIPELINES if reason_not_to_run(words) is None]
    assert undecided == []
    used = {script_of(words) for _, _, pipeline in PIPELINES for words in pipeline}
    assert {*QUICK, *NOT_RUN} <= used, "a script that no document mentions any more"
    assert len(RUN) >= 6 and len(PIPELINES) > 50


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository, for outputs."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in (".git", "out"):
            (folder / path.name).symlink_to(path)
    return folder


def continues_python(stdout):
    """Whether the demo continued its prompt with Python, with all its experts."""
    prompt = "import numpy as np\n\n\ndef normalize(x, axis=None):\n"
    continued = stdout.split("np.asarray(x)\n", 1)[1].split("\nload ")[0]
    keywords = [word for word in re.findall(r"[a-z_]+", continued) if keyword.iskeyword(word)]
    indented = [line for line in continued.splitlines() if line.startswith("    ")]
    return (
        stdout.startswith(prompt) and "8.00 experts per token" in stdout and len(keywords) >= 5 and len(indented) >= 5
    )


FIRST = "python launch/infer.py --config configs/infer_demo.gin"  # of the README
# What the documents say about a command that runs.
SHOWS = {
    FIRST: continues_python,
    "python launch/infer.py --set policy.spec=topk:3": lambda stdout: "3.00 experts per token" in stdout,
    "head -c 300 moe_jax/files.py | python launch/infer.py --out out/infer --json": json.loads,
}


@pytest.mark.parametrize(
    "text", [FIRST, *(pytest.param(text, marks=pytest.mark.processes) for text in RUN if text != FIRST)]
)
def test_a_command_that_takes_seconds_runs_as_typed(text, checkout):
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'  # whatever its name is here
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", python + text],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{RUN[text]}: {done.stderr}"
    assert SHOWS.get(text, len)(done.stdout), done.stdout
    for out in re.findall(r"--out (\S+)", text):
        assert (checkout / out / "result.json").exists()


def test_every_claim_is_about_a_command_that_runs():
    assert set(SHOWS) <= set(RUN)


@pytest.mark.parametrize("path", written.DOCUMENTS, ids=lambda path: path.name)
def test_python_code_runs(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line, language, content in written.fences(path):
        assert language in ("", "python", "text"), f"{path.name}:{line}: a block that nothing checks"
        if language == "python":
            exec(compile(content, f"{path.name}:{line}", "exec"), {})
            assert capsys.readouterr().out


def requirement_problem(arguments):
    """What is wrong with the arguments of `pip install`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if arguments[0] == "-r":
        if not (ROOT / arguments[1]).exists():
            return f"no file {arguments[1]}"
        lines = (ROOT / arguments[1]).read_text().splitlines()
        return "".join(requirement_problem(line.split(maxsplit=1)) for line in lines)
    if arguments[0] == "-e":
        extra = arguments[1].removeprefix(".").strip("[]")
        return "" if not extra or extra in project["optional-dependencies"] else f"no extra {extra!r}"
    try:
        packaging.requirements.Requirement(" ".join(arguments))
    except packaging.requirements.InvalidRequirement as error:
        return f"{arguments}: {error}"
    return ""


def argparse_problem(script, arguments):
    """The error of a script without `command.run`, whose flags are declared in its source."""
    source = (ROOT / script).read_text()
    unknown = [
        word for word in arguments if word.startswith("--") and f'add_argument("{word.split("=")[0]}"' not in source
    ]
    return f"{script} has no {unknown}" if unknown else ""


def pytest_problem(arguments):
    """Paths of the repository, and markers that exist."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    markers = {marker.split(":")[0] for marker in declared}
    asked = [word for flag, word in itertools.pairwise(arguments) if flag == "-m"]
    if not markers.issuperset(asked):
        return f"no marker {asked}"
    return "".join(f"no {word}" for word in arguments if "/" in word and not (ROOT / word).exists())


def problem(words):
    """What is wrong with a command that is not a launcher."""
    program, *arguments = words
    if program == "pip":
        return requirement_problem(arguments[1:]) if arguments[0] == "install" else "expected pip install"
    if program == "head":
        return "" if (ROOT / arguments[-1]).exists() else f"no file {arguments[-1]}"
    if arguments[:2] == ["-m", "pytest"]:
        return pytest_problem(arguments[2:])
    if program not in ("python", "bash") or not (ROOT / arguments[0]).exists():
        return f"no script {arguments[0]}"
    if program == "bash":
        return subprocess.run(["bash", "-n", ROOT / arguments[0]], capture_output=True, text=True).stderr
    return argparse_problem(*arguments[:1], arguments[1:])


def is_launcher(words):
    """Whether a command runs a script that calls `command.run`."""
    path = ROOT / script_of(words)
    return words[0] == "python" and path.is_file() and "command.run(" in path.read_text()


def read_by_launchers(lines):
    """The error of each command line."""
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("parse_launchers.py"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=json.dumps(lines),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_command_is_valid():
    places = [(command.where, words) for command, _, pipeline in PIPELINES for words in pipeline]
    launched = [(where, words) for where, words in places if is_launcher(words)]
    found = read_by_launchers([words[1:] for _, words in launched])
    problems = [f"{where}: {found}" for (where, _), found in zip(launched, found, strict=True) if found]
    problems += [f"{where}: {found}" for where, words in places if not is_launcher(words) and (found := problem(words))]
    assert problems == []
    assert len(launched) > 40


MISTAKES = {
    "launch/infer.py --promt a": "promt",
    "launch/sweep.py --set sweep.policy=topk:4": "sweep.policies",
    "launch/sweep.py --set sweep.policies=('topq:4',)": "'topq:4'",
    "launch/train.py --config configs/train_dmo.gin": "configs/train_demo.gin",
    "launch/infer.py more": "unexpected argument",
}


def test_a_wrong_command_is_found():
    found = read_by_launchers([line.split() for line in MISTAKES])
    assert [line for line, message in zip(MISTAKES, found, strict=True) if MISTAKES[line] not in message] == []
    assert problem(["pip", "install", "-r", "requirements-den.txt"]) and problem(["pip", "install", "a=>3"])
    assert problem(["bash", "benchmarks/of_device.sh"]) and problem(["python", "benchmarks/kernel.py"])
    assert problem(["python", "benchmarks/kernels.py", "--stages=a"]) and problem(["head", "moe_jax/file.py"])
    assert problem(["python", "-m", "pytest", "-m", "sloow"]) and problem(["python", "-m", "pytest", "tests/fault"])
    assert reason_not_to_run([["python", "launch/new.py"]]) is None
