"""A disk that fills up while results, models and checkpoints are written. The test's name says how it was limited."""

import json
import resource

import numpy as np
import pytest

import moe_jax
from moe_jax import files
from tests.faults import launched
from tests.faults.small_disk import FULL, LIMIT, best_way, small_disk

pytestmark = pytest.mark.processes

WAYS = pytest.mark.parametrize("way", [best_way()])
BOTH_WAYS = pytest.mark.parametrize("way", [best_way(), pytest.param(LIMIT, marks=pytest.mark.slow)])


@BOTH_WAYS
def test_a_checkpoint_that_does_not_fit_stops_the_run_which_resumes_with_more_space(training_run, tmp_path, way):
    """A checkpoint takes about 800 kB in files of up to 400 kB, and the export less; those of fine-tuning 3 MB."""
    launcher, flags, expected = training_run
    size_bytes = {"train": 1_500_000, "finetune": 5_500_000}[launcher]
    with small_disk(tmp_path / "disk", {LIMIT: 50_000}.get(way, size_bytes), way) as disk:
        flags = [*flags, f"--out={disk.folder / 'out'}"]
        ended = launched.run(launcher, *flags, folder=tmp_path, within=disk.within)
        assert (ended.status, ended.stdout, "Traceback" in ended.stderr) == (2, "", False), ended.stderr
        *others, last = ended.stderr.splitlines()
        assert last.startswith("error: ") and not any(line.startswith("error: ") for line in others)
        assert "a checkpoint could not be written" in last
        assert any(reason in last for reason in FULL.split("|")), last
        saved = [int(path.name) for path in (disk.seen / "out" / "checkpoints").iterdir() if path.name.isdigit()]
        kept = f"the last good one is that of step {max(saved)}" if saved else "there is none before it"
        assert last.endswith(kept) and bool(saved) == disk.is_tmpfs
        assert not (disk.seen / "out" / "result.json").exists()

        disk.grow()
        ended = launched.run(launcher, *flags, folder=tmp_path, within=disk.within)
        assert ended.status == 0, ended.stderr
        weights = [(out / "model" / "model.safetensors").read_bytes() for out in (expected, disk.seen / "out")]
        assert weights[0] == weights[1]


@WAYS
def test_a_result_that_does_not_fit_is_reported_and_not_half_written(model, tmp_path, way):
    with small_disk(tmp_path / "disk", {LIMIT: 1500}.get(way, 8192), way) as disk:
        flags = [f"--set=model.path={model}", "--prompt=The", "--set=sampling.max_new_tokens=4"]
        out = disk.folder / "out"
        ended = launched.run("infer", *flags, f"--out={out}", folder=tmp_path, within=disk.within)
        assert (ended.status, "Traceback" in ended.stderr) == (2, False), ended.stderr
        last = ended.stderr.splitlines()[-1]
        assert last.startswith(f"error: {out}/") and any(last.endswith(reason) for reason in FULL.split("|")), last
        left = launched.entries(disk.seen / "out")
        assert "completions.jsonl" in left and left <= {"completions.jsonl", "config.gin"}
        json.loads((disk.seen / "out" / "completions.jsonl").read_text())


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_that_does_not_fit_is_not_saved(model, tmp_path, small_files):
    loaded = moe_jax.load(model)
    with pytest.raises(OSError, match=FULL) as refusal:
        loaded.save(tmp_path / "copy")
    assert refusal.value.filename == str(tmp_path / "copy")
    assert launched.entries(tmp_path) == set()


def test_a_file_that_does_not_fit_keeps_the_old_one(tmp_path, small_files):
    files.write_atomically(tmp_path / "a", b"old")
    with pytest.raises(OSError, match=FULL) as refusal:
        files.write_atomically(tmp_path / "a", np.zeros(200_000, np.uint8).tobytes())
    assert refusal.value.filename == str(tmp_path / "a")
    assert launched.entries(tmp_path) == {"a"} and (tmp_path / "a").read_bytes() == b"old"
