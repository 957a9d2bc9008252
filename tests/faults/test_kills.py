"""After many kills, the result equals that of an undisturbed run, bit for bit."""

import random
import signal
import time

import pytest

from tests.faults import kills, launched

pytestmark = pytest.mark.processes

# Launcher -> files that must be equal byte for byte, and the number of kills in the slow test.
LAUNCHERS = {
    "train": (["model/model.safetensors", "model/training_curve.png"], 10),
    "evaluate": (["documents.csv", "expert_load.csv"], 10),
    "infer": (["completions.jsonl"], 5),
    "finetune": (["model/model.safetensors", "model/training_curve.png", "documents.csv"], 5),
}


@pytest.fixture(scope="module")
def undisturbed(training_flags, finetuning_flags, model, sources, tmp_path_factory):
    """Launcher -> its flags, the folder of an undisturbed run, and the seconds that it took."""
    done = {}

    def run(launcher):
        if launcher not in done:
            loading = [f"--set=model.path={model}", "--set=model.dtype=float32"]
            flags = {
                "train": training_flags,
                "finetune": [*finetuning_flags, "--set=finetune.rollouts=70"],
                "infer": [
                    *loading,
                    "--prompt=The quick",
                    "--set=sampling.max_new_tokens=30",
                    "--set=policy.spec=topk:3",
                ],
                "evaluate": [
                    *loading,
                    f"--set=text.held_out={sources / 'held_out'}",
                    '--set=evaluation.policies=("topk:8", "topk:2")',
                    *("--set=evaluation.choice_questions=8", "--set=evaluation.completion_headers=6"),
                    "--set=evaluation.completion_tokens=8",
                ],
            }[launcher]
            folder = tmp_path_factory.mktemp(launcher)
            for _ in range(2):  # the second run finds the programs compiled
                seconds = -time.monotonic()
                ended = launched.run(launcher, *flags, "--out=out", folder=folder)
                seconds += time.monotonic()
                assert ended.status == 0, ended.stderr
            done[launcher] = flags, folder / "out", seconds
        return done[launcher]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_many_kills_change_nothing(undisturbed, tmp_path, record_property, launcher):
    flags, expected, seconds = undisturbed(launcher)
    files, count = LAUNCHERS[launcher]
    killed = kills.kill_repeatedly(launcher, flags, tmp_path / "out", kills=count, within_s=seconds, seed=1)
    record_property("kills", repr(killed))
    print(launcher, killed, f"{seconds:.1f} s undisturbed")
    kills.assert_same(tmp_path / "out", expected, files)


def test_training_killed_once_goes_on_bit_identically(training_run, tmp_path):
    """At a random step after its first checkpoint, or soon after the last."""
    launcher, flags, expected = training_run
    out, wait_for = tmp_path / "out", random.randrange(4, 9)
    with kills.started(launcher, flags, out) as process:
        kills.wait_for_lines(process, out, wait_for)
        time.sleep(random.random() * 0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run was over before it was killed: nothing was tested"
    assert not (out / "result.json").exists()
    ended = launched.run(launcher, *flags, f"--out={out}", folder=tmp_path)
    assert ended.status == 0, f"killed after {wait_for} lines: {ended.stderr}"
    assert kills.steps(out) == kills.steps(expected)
    kills.assert_same(out, expected, ["model/model.safetensors"])
