"""Output folders and caches that cannot be written to, and prompts that are not text."""

import os
import sys

import hypothesis
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies

from tests import launcher_module
from tests.faults import launched
from tests.faults.small_disk import TMPFS, best_way, small_disk

# Where not even root can make a folder.
NOWHERE = [path for path in ("/sys/out", "/proc/out", "/dev/null/out", "/proc/self/fd/out") if os.path.exists("/proc")]


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["infer", "train", "evaluate"])
@pytest.mark.parametrize("out", [*NOWHERE, "file", "file/out", "loop", "loop/out", "x" * 300, "\udcff/" + "y" * 300])
def test_an_output_folder_that_cannot_be_made_is_refused_before_jax_is_imported(tmp_path, launcher, out):
    (tmp_path / "jax.py").write_text(
        'raise RuntimeError("JAX is imported before the output folder has been checked")\n'
    )
    (tmp_path / "file").write_text("a file")
    (tmp_path / "loop").symlink_to("loop")
    before = launched.entries(tmp_path)
    ended = launched.run(launcher, f"--out={out}", folder=tmp_path, path=[tmp_path], timeout=60)
    assert launched.not_refused(ended, "--out = ") == ""
    assert launched.entries(tmp_path) - {"__pycache__"} == before


@pytest.mark.processes
@pytest.mark.parametrize("way", [best_way()])
def test_a_read_only_file_system_is_refused(tmp_path, way):
    if way != TMPFS:
        pytest.skip("no file system can be mounted here; /sys and /proc stand for it above")
    with small_disk(tmp_path / "disk", 100_000, way) as disk:
        remount = ["mount", "-o", "remount,ro", str(disk.folder)]
        assert launched.subprocess.run([*disk.within, *remount], check=False).returncode == 0
        ended = launched.run("train", f"--out={disk.folder}/out", folder=tmp_path, within=disk.within)
    assert launched.not_refused(ended, "Read-only file system; expected a folder") == ""


@pytest.mark.processes
def test_a_cache_that_cannot_be_written_gives_a_warning(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    flags = [f"--set=model.path={model}", "--prompt=The", "--set=sampling.max_new_tokens=2"]
    ended = launched.run("infer", *flags, folder=tmp_path)
    assert ended.status == 0, ended.stderr
    assert "compiled programs are not kept for the next run" in ended.stderr and "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def read_prompts():
    module = launcher_module.import_launcher("infer")

    def read(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["infer", *arguments])
            return module.read_prompts()

    return read


@hypothesis.given(data=strategies.binary(max_size=300) | strategies.text().map(str.encode))
def test_a_prompt_file_is_text_or_refused_by_name(read_prompts, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("prompts") / "prompt"
    path.write_bytes(data)
    try:
        assert read_prompts(f"--prompt_file={path}") == [data.decode()]
        assert data and b"\0" not in data
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge", "loop", "a zero byte in the name"])
def test_a_prompt_file_that_is_not_a_file_is_refused(read_prompts, tmp_path, kind):
    path = tmp_path / "prompt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(10**12)
    elif kind == "loop":
        path.symlink_to("prompt")
    else:
        path = f"{path}\0"
    with pytest.raises(ValueError, match="--prompt_file = "):
        read_prompts(f"--prompt_file={path}")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stdin", "says"),
    [(b"a\0b", "byte 1 is 0"), (b"\x89PNG\r\n", "byte 0 is not UTF-8"), (b"fox " * 500_000, "expected at most 255")],
)
def test_piped_input_is_text_that_fits_or_is_refused(model, tmp_path, stdin, says):
    ended = launched.run("infer", f"--set=model.path={model}", folder=tmp_path, stdin=stdin)
    assert launched.not_refused(ended, says) == ""


@pytest.mark.processes
def test_a_model_larger_than_memory_is_refused_before_text_is_read(tmp_path):
    ended = launched.run("train", "--set=decoder.d_model=1000000", "--out=out", folder=tmp_path)
    assert launched.not_refused(ended, r"training [\d,.]+ M parameters .* GB of memory, .* GB available") == ""
    assert launched.entries(tmp_path) == set()


assert sys.platform == "linux", "these faults are made with Linux's own means"
