"""Launchers on meshes, in one process and in two that are joined: the same results, and refusals in one line."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests import tiny_model, tiny_training
from tests.mesh.started import ROOT, finished, free_port, joined, result, start, values

pytestmark = pytest.mark.processes
DEMO = ["--set=sampling.temperature=0.0", "--set=sampling.max_new_tokens=24", "--prompt=def read(path):"]


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


def test_two_processes_evaluate_as_one_does(tmp_path):
    folder = tiny_model.write_model(tmp_path / "tiny", tiny_model.changed(decoder={"max_context": 256}))
    settings = {"model.path": folder, "evaluation.policies": '("topk:2",)', "evaluation.documents": 2}
    settings |= {"evaluation.choice_questions": 4, "evaluation.completion_headers": 0, "evaluation.batch_size": 4}
    settings |= {"mesh.data": 2, "mesh.expert": 4}
    arguments = [f"--set={name}={value}" for name, value in settings.items()]
    finished(start("evaluate", *arguments, f"--out={tmp_path / 'one'}", devices=8))
    (stdout, _), (silent, _) = finished(*joined("evaluate", *arguments, f"--out={tmp_path / 'two'}"))
    one, two = (values(result(tmp_path / name)["figures"]) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4) and {"bits_per_byte", "kl_to_full", "choice_accuracy"} <= two.keys()
    assert "`topk:2`" in stdout and silent == ""
    assert not (tmp_path / "two" / "parts").exists()


def test_finetuning_with_lora_on_eight_devices_follows_one_device(tmp_path, sources):
    """Factors of every matrix are split, gathered and merged; the export is measured on the mesh again."""
    settings = {"finetune.train": "lora", "finetune.lora_rank": 2, "training.learning_rate": 0.03}
    settings |= {"training.steps": 6, "training.checkpoint_every": 6, "evaluation.batch_size": 4}
    model = tiny_model.write_model(tmp_path / "tiny")
    (tmp_path / "plain.gin").write_text("")
    arguments = [f"--set={one}" for one in tiny_training.finetuning_overrides(sources, model, **settings)]
    arguments.append(f"--config={tmp_path / 'plain.gin'}")
    mesh = [f"--set=mesh.{axis}=2" for axis in ("data", "expert", "tensor", "fsdp")]
    finished(start("finetune", *arguments, f"--out={tmp_path / 'one'}"))
    finished(start("finetune", *arguments, *mesh, f"--out={tmp_path / 'eight'}", devices=8))
    one, eight = (result(tmp_path / name)["rows"] for name in ("one", "eight"))
    assert [row["policy"] for row in one] == [row["policy"] for row in eight] == ["model", "topk:3"]
    for alone, row in zip(one, eight):
        assert values(row["figures"]) == pytest.approx(values(alone["figures"]), abs=1e-4)
        assert row["figures"]["change"]["value"] < -0.05


@pytest.mark.parametrize("mesh", [{"expert": 8}, {"data": 2, "expert": 4, "expert_axes": ["data", "expert"]}])
def test_each_of_two_processes_reads_its_share_of_the_file_and_both_save_it(tmp_path, mesh):
    """Half of the experts, and everything else; to 64 kB at the ends of each part, as the kernel maps a file."""
    large = tiny_model.changed(
        decoder={"d_model": 256, "num_dense_layers": 0, "num_layers": 2}, moe={"expert_hidden": 256}
    )
    folder = tiny_model.write_model(tmp_path / "large", large)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    place = f"localhost:{free_port()}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command_line = [sys.executable, "-m", "tests.mesh.one_of_two"]
    processes = [
        subprocess.Popen(
            [*command_line, place, str(index), json.dumps(mesh), str(folder), str(tmp_path / "saved")],
            cwd=ROOT,
            env=environment,
            **pipes,
        )
        for index in range(2)
    ]
    for _, stderr in finished(*processes):
        [line] = [line for line in stderr.splitlines() if line.startswith("[")]
        share_bytes, touched_bytes, whole_bytes = json.loads(line)
        assert share_bytes <= touched_bytes <= 1.1 * share_bytes
        assert share_bytes < 0.6 * whole_bytes
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


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


def test_a_wrong_coordinator_is_refused_within_the_limit():
    place = ["--num_processes=2", "--process_id=1", "--join_s=5"]
    assert "--join_s=5 seconds" in refused(start("infer", *DEMO, "--coordinator=nowhere.invalid:8476", *place))


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        place = [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"]
        assert f"process 0 cannot listen on port {port} (Address already in use)" in refused(
            start("infer", *DEMO, *place)
        )
