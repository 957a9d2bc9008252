"""Signals at random moments: the right status, one line, no traceback, and an end."""

import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from tests.faults import kills, launched

pytestmark = pytest.mark.processes

LONG = {
    "infer": ["--prompt=The", "--set=sampling.max_new_tokens=100"],
    "train": ["--set=training.steps=100000"],
    "finetune": ["--set=training.steps=100000"],
}


def catches(process) -> bool:
    """Whether the process already handles SIGTERM: before that, Python is starting, and the default action is right."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def interrupted(launcher, flags, folder, number, delay_s):
    """Sends a signal; returns what was wrong with how the process ended, or "". None: it had ended before."""
    with subprocess.Popen(
        launched.command_line(launcher, *flags, "--out=out"),
        env=launched.environment(),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not catches(process):
            time.sleep(0.005)
        time.sleep(delay_s)
        process.send_signal(number)
        try:
            _, stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"{launcher}: signal {number} after {delay_s:.2f} s: it does not end"
    if process.returncode == 0:
        return None
    last = (stderr.splitlines() or [""])[-1]
    if process.returncode == 128 + number and last == "interrupted" and "Traceback" not in stderr:
        return ""
    return f"{launcher}: signal {number} after {delay_s:.2f} s: status {process.returncode}, {stderr[-1500:]!r}"


@pytest.fixture(scope="module")
def long_flags(model, training_flags, finetuning_flags):
    return {
        "infer": [f"--set=model.path={model}", *LONG["infer"]],
        "train": [*training_flags, *LONG["train"]],
        "finetune": [*finetuning_flags, *LONG["finetune"]],
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc to see when signals are handled")
@pytest.mark.parametrize(
    ("launcher", "number", "count"),
    [
        ("infer", signal.SIGINT, 1),
        ("train", signal.SIGTERM, 1),
        *(
            pytest.param(launcher, number, 8, marks=pytest.mark.slow)
            for launcher in LONG
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)
def test_a_signal_ends_a_launcher_in_one_line(long_flags, tmp_path, launcher, number, count):
    moments = random.Random(f"{launcher} {number} {count}")
    ends = []
    for index in range(count):
        folder = tmp_path / str(index)
        folder.mkdir()
        delay_s = moments.uniform(0, 3.0 if count > 1 else 1.0)
        ends.append(interrupted(launcher, long_flags[launcher], folder, number, delay_s))
        assert not [name for name in launched.entries(folder) if name.endswith(".partial")]
    print(launcher, number, ends)
    assert [end for end in ends if end] == []
    assert ends.count(None) <= count // 2, "most runs were over before the signal came: nothing was tested"


def test_an_interrupted_finetuning_saves_and_resumes(finetuning_flags, finetuned, tmp_path):
    """At a random step, with no checkpoint due before the end."""
    out, wait_for = tmp_path / "out", random.randrange(1, 7)
    with kills.started("finetune", [*finetuning_flags, "--set=training.checkpoint_every=1000"], out) as process:
        kills.wait_for_lines(process, out, wait_for)
        process.send_signal(signal.SIGTERM)
        stderr = process.stderr.read().decode()
    assert process.returncode == 143 and stderr.splitlines()[-1] == "interrupted", stderr
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == kills.steps(out)[-1]["step"]
    assert not (out / "result.json").exists()
    ended = launched.run("finetune", *finetuning_flags, f"--out={out}", folder=tmp_path)
    assert ended.status == 0, f"interrupted at step {saved}: {ended.stderr}"
    assert kills.steps(out) == kills.steps(finetuned)
    kills.assert_same(out, finetuned, ["model/model.safetensors", "documents.csv"])


def test_a_closed_pipe_ends_infer_quietly(model, tmp_path):
    """Like `| head -c 1`."""
    with subprocess.Popen(
        launched.command_line("infer", f"--set=model.path={model}", *LONG["infer"]),
        env=launched.environment(),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
    assert (process.returncode, stderr) == (141, b"")
