import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moe_jax import command, files
from moe_jax.config import gin

LAUNCHER = '''"""Probes: what one launcher does."""

import time

from moe_jax import command


def main(run):
    kind, _, detail = run.config.model.path.partition(":")
    if kind == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("saving", flush=True)
            time.sleep(0.2)
            (run.out / "saved").write_text("what is done")
            if detail == "raise":
                raise
            return 0
    if kind == "value":
        raise ValueError("two\\n  lines")
    if kind == "os":
        open(detail)
    if kind == "full":
        raise OSError(28, "No space left on device")
    if kind == "bug":
        raise RuntimeError("a bug")
    if kind == "print":
        print("progress")
        return 0
    if kind == "status":
        return int(detail)
    with run.timed("run"):
        print("progress")
    with run.timed("run"):
        pass
    run.implementations["expert_ffn"] = "blocked"
    figures = {"speed": {"value": 2.5, "unit": "tokens/s"}, "loss": {"value": float("nan"), "unit": "nats"}}
    run.finish(figures, rows=[{"policy": "topk:3", "figures": figures}], text="speed 2.5 tokens/s")


if __name__ == "__main__":
    command.run(main)
'''
# Importing JAX takes a second: where only what surrounds it is tested, a stand-in is imported, or one that must not be.
STANDINS = {
    "hollow": "class config:\n    update = staticmethod(lambda name, value: None)\ndef devices(): pass\n",
    "forbidden": 'raise RuntimeError("JAX is imported before the command line has been checked")\n',
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the launcher in an empty folder, with JAX or a stand-in for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    files.write_atomically("launch/probe.py", LAUNCHER)
    for name, source in STANDINS.items():
        files.write_atomically(f"{name}/jax.py", source)

    def start(*arguments, jax="hollow", **popen):
        paths = [str(pathlib.Path(command.__file__).parents[1])] + ([] if jax == "real" else [str(tmp_path / jax)])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": ""}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
        return subprocess.Popen(
            [sys.executable, "launch/probe.py", *arguments], env=environment, text=True, errors="replace", **pipes
        )

    return start


def finished(process):
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def refused_in_one_line(process):
    status, stdout, stderr = finished(process)
    last = stderr.splitlines()[-1]
    assert (status, stdout, "Traceback" in stderr) == (2, "", False), stderr
    assert last.startswith("error: ") and stderr.count("error: ") == 1
    return last


@pytest.mark.parametrize("platform", ["tpu", "a_typo"])
def test_a_platform_that_is_not_here_is_refused(start, monkeypatch, platform):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    line = refused_in_one_line(start("--out=out", jax="real"))
    assert f"JAX_PLATFORMS = '{platform}'" in line and not pathlib.Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cofig=a.gin"], ["cofig", "config"]),
        (["--config"], ["config"]),
        (["--json=perhaps"], ["json", "perhaps"]),
        (["a.gin"], ["'a.gin'", "expected a flag, as in --config a.gin"]),
        (["moe.k=3"], ["expected --set moe.k=3"]),
        (["--config=missing.gin"], ["missing.gin: no such config file"]),
        (["--set", "moe.kk=3"], ["--set moe.kk=3", "nearest: moe.k;"]),
        (["--set", "moe.k=a\nb"], ["moe.k=a b"]),
        (["--out=launch/probe.py"], ["--out = 'launch/probe.py': launch/probe.py is not a folder"]),
        (["--out=launch/probe.py/x"], ["launch/probe.py is not a folder"]),
        (["--out="], ["--out = ''"]),
        (["--out=new/" + "x" * 300], ["File name too long"]),
    ],
)
def test_a_mistaken_command_line_is_refused_before_jax_is_imported(start, arguments, expected):
    line = refused_in_one_line(start(*arguments, jax="forbidden"))
    assert [part for part in expected if part not in line] == [], line
    assert not pathlib.Path("new").exists()


def test_help_lists_the_flags_and_succeeds(start):
    status, stdout, stderr = finished(start("--help", jax="forbidden"))
    assert (status, stderr) == (0, "")
    for part in ("Probes: what one launcher does.", "--config", "--set", "--out", "--[no]json"):
        assert part in stdout


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """In the process itself: permission bits do not bind root, so writing is made to fail."""

    def read_only(self, data):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "write_bytes", read_only)
    with pytest.raises(ValueError, match="Read-only file system; expected a folder"):
        command._open_folder(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("value:", "error: two lines"),
        ("os:gone", "error: gone: No such file or directory"),
        ("full:", "error: No space"),
    ],
)
def test_what_main_refuses_is_one_line_and_leaves_no_folder(start, path, expected):
    line = refused_in_one_line(start(f"--set=model.path={path}", "--out=a/b"))
    assert line.startswith(expected)
    assert not pathlib.Path("a").exists()


def test_a_bug_keeps_its_traceback(start):
    status, _, stderr = finished(start("--set=model.path=bug"))
    assert status == 1
    assert "Traceback" in stderr and "RuntimeError: a bug" in stderr and "error: " not in stderr


def test_the_status_of_main_is_the_exit_status(start):
    assert finished(start("--set=model.path=status:3"))[0] == 3


def test_results_are_written_and_replay(start):
    status, stdout, stderr = finished(start("--set", "moe.k=3", "--set", "run.seed=7", "--out=runs/a", jax="real"))
    assert (status, stdout) == (0, "progress\nspeed 2.5 tokens/s\n"), stderr
    assert sorted(os.listdir("runs/a")) == ["config.gin", "result.json"]
    assert gin.read_config("runs/a/config.gin") == gin.read_config(None, ["moe.k=3", "run.seed=7"])
    result = json.loads(pathlib.Path("runs/a/result.json").read_text())
    assert list(result) == [
        *("command", "config", "versions", "device", "seed", "implementations", "seconds", "peak_memory_bytes"),
        *("figures", "rows"),
    ]
    assert (result["command"], result["config"]["moe"]["k"], result["seed"]) == ("probe", 3, 7)
    assert set(result["versions"]) == {"jax", "jaxlib", "flax", "numpy", "python", "moe_jax"}
    assert set(result["device"]) == {"platform", "kind", "count", "cores"}
    assert result["implementations"] == {"expert_ffn": "blocked"}
    assert list(result["seconds"]) == ["run"] and 0 <= result["seconds"]["run"] < 60
    assert 10**7 < result["peak_memory_bytes"] < 10**11
    assert result["figures"] == {"speed": {"value": 2.5, "unit": "tokens/s"}, "loss": {"value": None, "unit": "nats"}}
    assert result["rows"] == [{"policy": "topk:3", "figures": result["figures"]}]


def test_json_prints_the_result_alone(start):
    status, stdout, stderr = finished(start("--json", "--set=moe.k=3", jax="real"))
    assert status == 0
    assert json.loads(stdout)["config"]["moe"]["k"] == 3
    assert "progress" in stderr


def test_a_compilation_cache_that_cannot_be_written_is_only_logged(start):
    pathlib.Path("cache").write_text("a file")
    status, _, stderr = finished(start("--set=model.path=status:0"))
    assert status == 0
    assert "compiled programs are not kept for the next run: " in stderr


@pytest.mark.parametrize(
    ("path", "number", "expected"),
    [("wait:raise", signal.SIGINT, 130), ("wait:raise", signal.SIGTERM, 143), ("wait:return", signal.SIGINT, 130)],
)
def test_interruption_lets_main_save_and_ends_at_once(start, path, number, expected):
    process = start(f"--set=model.path={path}", "--out=out")
    assert process.stdout.readline() == "waiting\n"
    began = time.monotonic()
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(number)  # an echo
    status, _, stderr = finished(process)
    assert time.monotonic() - began < 20, "main would sleep for 60 s"
    assert (status, stderr.splitlines()[-1], "Traceback" in stderr) == (expected, "interrupted", False)
    assert pathlib.Path("out/saved").read_text() == "what is done"


def test_a_reader_that_left_ends_the_run_quietly(start):
    reading, writing = os.pipe()
    os.close(reading)
    status, _, stderr = finished(start("--set=model.path=print", stdout=writing))
    os.close(writing)
    assert (status, stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_behind_standard_output_is_refused(start):
    with open("/dev/full", "w") as full:
        status, _, stderr = finished(start("--set=model.path=print", stdout=full))
    assert (status, stderr) == (2, "error: No space left on device\n")


def test_a_folder_of_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    repository = pathlib.Path(command.__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    assert command.in_repository("configs") == repository / "configs"
    (tmp_path / "configs").mkdir()
    assert command.in_repository("configs") == pathlib.Path("configs")
    assert command.in_repository("nowhere") == pathlib.Path("nowhere")
    with pytest.raises(ValueError, match=r"text\.held_out = '': expected a folder"):
        command.in_repository("", "text.held_out")
