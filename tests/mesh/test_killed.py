"""One of two joined processes is killed: the other ends and says why, and training resumes bit-identically."""

import time

import pytest

from tests import tiny_training
from tests.faults import kills
from tests.mesh.started import finished, joined

pytestmark = pytest.mark.processes
SETTINGS = {
    **{"training.steps": 6, "training.checkpoint_every": 2, "training.evaluate_every": 6},
    **{"mesh.data": 2, "mesh.expert": 4, "evaluation.batch_size": 4, "evaluation.policies": ("model",)},
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    sources = tiny_training.write_sources(tmp_path_factory.mktemp("sources"))
    return [f"--set={one}" for one in tiny_training.overrides(sources, **SETTINGS)]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    finished(*joined("train", *flags, f"--out={out}"))
    return out


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_other_process_ends_and_training_resumes_bit_identically(flags, unbroken, tmp_path, victim):
    out = tmp_path / "out"
    processes = joined("train", *flags, f"--out={out}")
    kills.wait_for_lines(processes[victim], out, 3)
    processes[victim].kill()
    began = time.monotonic()
    _, stderr = processes[1 - victim].communicate(timeout=60)
    ended_after_s = time.monotonic() - began
    assert processes[1 - victim].returncode not in (0, None), "the run was over before the kill: nothing was tested"
    assert any(reason in stderr for reason in ("another task died", "heartbeat", "Socket closed")), stderr[-3000:]
    processes[victim].communicate()
    print(f"process {1 - victim} ended {ended_after_s:.1f} s after process {victim} was killed")
    assert not (out / "result.json").exists()
    finished(*joined("train", *flags, f"--out={out}"))
    assert kills.steps(out) == kills.steps(unbroken)
    kills.assert_same(out, unbroken, ["model/model.safetensors"])
