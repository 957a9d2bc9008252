"""Launchers on meshes, in one process and in two that are joined: the same results, and refusals in one line."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests import tiny_model, tiny_training

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.processes
DEMO = ["--set=sampling.temperature=0.0", "--set=sampling.max_new_tokens=24", "--prompt=def read(path):"]


def start(name, *arguments, devices=1, **popen):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command_line = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    return subprocess.Popen(command_line, cwd=ROOT, env=environment, text=True, **pipes)


def finished(*processes):
    """Standard output and error of each process, all of which succeeded."""
    ended = [process.communicate() for process in processes]
    for process, (_, stderr) in zip(processes, ended):
        assert process.returncode == 0, stderr[-3000:]
    return ended


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def joined(name, *arguments):
    """Two processes of four devices each."""
    place = f"--coordinator=localhost:{free_port()}"
    return [
        start(name, *arguments, place, "--num_processes=2", f"--process_id={index}", devices=4) for index in range(2)
    ]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def completions(folder):
    lines = map(json.loads, (folder / "completions.jsonl").read_text().splitlines())
    return [line["ids"] for line in lines]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tiny_training.write_sources(tmp_path_factory.mktemp("sources"))


def test_greedy_text_of_the_demo_is_the_same_on_eight_devices(tmp_path):
    finished(start("infer", *DEMO, f"--out={tmp_path / 'one'}"))
    finished(start("infer", *DEMO, "--set=mesh.expert=8", f"--out={tmp_path / 'eight'}", devices=8))
    assert completions(tmp_path / "eight") == completions(tmp_path / "one")
    implementations = result(tmp_path / "eight")["implementations"]
    assert implementations["grouped_matmul"] == "blocked" and "native" not in implementations.values()
    assert implementations["dispatch"] != "local" and result(tmp_path / "eight")["device"]["count"] == 8


def test_two_processes_generate_what_one_does(tmp_path):
    folder = tiny_model.write_model(tmp_path / "tiny")
    arguments = [f"--set=model.path={folder}", "--set=sampling.max_new_tokens=12", "--prompt=the fox", "--prompt=walk"]
    finished(start("infer", *arguments, f"--out={tmp_path / 'one'}"))
    mesh = ["--set=mesh.data=2", "--set=mesh.expert=4"]
    (stdout, _), (silent, _) = finished(*joined("infer", *arguments, *mesh, f"--out={tmp_path / 'two'}"))
    assert completions(tmp_path / "two") == completions(tmp_path / "one")
    assert "the fox" in stdout and silent == ""


def test_two_processes_train_and_evaluate_as_one_does(tmp_path, sources):
    settings = {"training.steps": 20, "training.batch_size": 4, "training.evaluate_every": 10}
    settings |= {"mesh.data": 2, "mesh.expert": 4, "mesh.fsdp": 2, "evaluation.batch_size": 4}
    arguments = [f"--set={one}" for one in tiny_training.overrides(sources, **settings)]
    finished(start("train", *arguments, f"--out={tmp_path / 'one'}", devices=8))
    finished(*joined("train", *arguments, f"--out={tmp_path / 'two'}"))

    def metrics(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{name: line[name] for name in ("step", "loss", "bits_per_byte") if name in line} for line in lines]

    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 22
    for expected, line in zip(one, two):
        assert line == pytest.approx(expected, abs=1e-4)
    expected, figures = (result(tmp_path / name)["figures"]["bits_per_byte"]["value"] for name in ("one", "two"))
    assert figures == pytest.approx(expected, abs=1e-4)


def refused(process):
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr[-3000:]
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in stderr
    return last


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set=mesh.expert=8"], "= 1 x 8 x 1 = 8 devices: expected at most 1; on a CPU, JAX_NUM_CPU_DEVICES=8"),
        (["--set=mesh.expert=3"], "3 devices: expected at most 1"),
        (["--num_processes=2"], "--num_processes = 2: expected --coordinator with it"),
        (["--coordinator=here"], "--coordinator = 'here': expected host:port"),
        (["--coordinator=localhost:1"], "--num_processes = None: expected the number of processes"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id = 2: expected 0 to 1",
        ),
        (["--coordinator=auto", "--join_s=5"], "--coordinator = 'auto': expected a cluster that JAX knows"),
    ],
)
def test_what_cannot_run_is_refused(arguments, expected):
    assert expected in refused(start("infer", *DEMO, *arguments))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["mesh.expert=3"], "mesh.expert = 3: expected a divisor of the model's 64 experts"),
        (["mesh.expert=8", "mesh.dispatch=alltoall"], "mesh.dispatch = 'alltoall': expected auto or one of local, rep"),
        (["mesh.expert=8", "mesh.dispatch=local"], "expected all experts on each device, got 8 parts of them"),
    ],
)
def test_what_does_not_fit_the_demo_is_refused(settings, expected):
    assert expected in refused(start("infer", *DEMO, *(f"--set={one}" for one in settings), devices=8))


def test_a_command_that_runs_on_one_device_refuses_a_mesh():
    assert "this command runs on one device" in refused(start("benchmark", "--set=mesh.expert=8", devices=8))


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_never_comes_is_refused_within_the_limit(index):
    place = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", f"--process_id={index}", "--join_s=5"]
    assert "--join_s=5 seconds" in refused(start("infer", *DEMO, *place))
