"""Damaged checkpoints of a training run are never trained on and never skipped silently."""

import os
import shutil
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import orbax
from moe_jax.checkpoint.orbax import Checkpoints
from tests.faults import launched

STATE = {"weights": jnp.arange(100_000.0), "bias": {"E": jnp.ones((3, 4)), "step": jnp.zeros((), jnp.int32)}}
PLACE = {"stream": {"epoch": 3, "batch": 7}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, 2)
    for step in (1, 2, 3):
        checkpoints.save(step, jax.tree.map(lambda x, step=step: x + step, STATE), PLACE)
    checkpoints.close()
    return folder


HARMS = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": os.remove,
    "a bit flipped": lambda path: path.write_bytes(
        (data := path.read_bytes())[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_refused_or_changes_nothing(saved, tmp_path, capfd, harm):
    """Each file of the checkpoint in turn; some only repeat the contents of others."""
    files = sorted(path.relative_to(saved) for path in (saved / "3").rglob("*") if path.is_file())
    refused = 0
    for file in files:
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        if not (folder / file).stat().st_size:
            continue
        HARMS[harm](folder / file)
        checkpoints = Checkpoints(folder, 2)
        assert checkpoints.latest_step == 3
        try:
            state, place = checkpoints.restore(3, STATE)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{folder / '3'} is damaged: remove it to go on from step 2 (")
            assert len(str(error).splitlines()) == 1
        else:
            assert place == PLACE
            jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other + 3), state, STATE)
        checkpoints.close()
    assert refused >= 4
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("file", "count"), [("/lib/orbax/reading.py", 0), ("/lib/moe_jax/reading.py", 1)])
def test_unfinished_coroutines_of_orbax_give_no_warning(monkeypatch, file, count):
    """Its event loop ends with the first failure; waiting coroutines are discarded without a traceback."""
    seen, code = [], {}
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    orbax._suppress_background_tracebacks()
    exec(compile("async def read(): pass", file, "exec"), code)
    unfinished = code["read"]()
    sys.unraisablehook(types.SimpleNamespace(exc_traceback=None, object=unfinished))
    unfinished.close()
    assert len(seen) == count


def test_without_the_damaged_checkpoint_the_earlier_one_is_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    state, _ = checkpoints.restore(checkpoints.latest_step, STATE)
    checkpoints.close()
    np.testing.assert_array_equal(state["weights"], STATE["weights"] + 2)


@pytest.mark.processes
def test_a_launcher_refuses_a_damaged_checkpoint_in_one_line(training_flags, trained, tmp_path):
    """Its largest file is truncated; earlier log lines stand above the error."""
    shutil.copytree(trained, tmp_path / "out")
    largest = max((tmp_path / "out" / "checkpoints" / "9").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    ended = launched.run("train", *training_flags, "--out=out", folder=tmp_path)
    assert (ended.status, ended.stdout, "Traceback" in ended.stderr) == (2, "", False), ended.stderr
    *others, last = ended.stderr.splitlines()
    assert last.startswith("error: ") and "checkpoints/9 is damaged: remove it to go on from step 6" in last
    assert not any("error" in line for line in others), ended.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
