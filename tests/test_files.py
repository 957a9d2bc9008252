import os
import subprocess
import sys
import time

import pytest

from moe_jax import files


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomically_replaces_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "result.json"
    files.write_atomically(path, b"old")
    files.write_atomically(path, "neu: \u00e9\n")
    assert path.read_bytes() == "neu: \u00e9\n".encode()
    assert entries(path.parent) == ["result.json"]


def test_write_atomically_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, function):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["a"]


def test_writing_onto_a_folder_is_refused_and_leaves_no_other_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path / "a", b"new")
    assert entries(tmp_path) == ["a"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replaced_folder_replaces_all_of_it(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "deep" / "model"
    for name in ("old", "new"):
        with files.replaced_folder(path) as partial:
            assert entries(partial) == []
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
            assert not (path / "sub" / "new").exists()
    assert entries(path / "sub") == ["new"]
    assert entries(path.parent) == ["model"]


@pytest.mark.parametrize("existing", [True, False])
def test_replaced_folder_that_raises_changes_nothing(tmp_path, existing):
    path = tmp_path / "model"
    if existing:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replaced_folder(path) as partial:
        (partial / "new").write_text("new")
        raise KeyboardInterrupt
    assert entries(tmp_path) == (["model"] if existing else [])
    assert not existing or entries(path) == ["old"]


def test_replaced_folder_puts_the_old_one_back_when_the_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("old")
    rename = os.rename

    def failing(source, target):
        if (files.pathlib.Path(source) / "new").exists():
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), files.replaced_folder(path) as partial:
        (partial / "new").write_text("new")
    assert entries(tmp_path) == ["model"]
    assert entries(path) == ["old"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged in one step on Linux only")
def test_an_existing_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.delattr(os, "rename")
    with files.replaced_folder(tmp_path / "model") as partial:
        (partial / "new").write_text("new")
    assert entries(tmp_path / "model") == ["new"]


def test_replaced_folder_refuses_a_file_and_follows_a_link(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError), files.replaced_folder(tmp_path / "file"):
        pass
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.replaced_folder(tmp_path / "link") as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "real") == ["new"]
    assert entries(tmp_path) == ["file", "link", "real"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged in one step on Linux only")
def test_a_killed_writer_leaves_a_whole_file_and_a_whole_folder(tmp_path):
    write = """
import itertools, sys
from moe_jax import files
for turn in itertools.count():
    files.write_atomically("file", str(turn % 10) * 300_000)
    with files.replaced_folder("folder") as partial:
        for name in "abc":
            (partial / name).write_text(str(turn))
    print(turn, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(files.pathlib.Path(files.__file__).parents[1])}
    for wait_s in (0.0, 0.003, 0.011):
        command = [sys.executable, "-c", write]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "0\n"
            time.sleep(wait_s)
            writer.kill()
        text = (tmp_path / "file").read_text()
        assert len(text) == 300_000 and len(set(text)) == 1
        assert len({(tmp_path / "folder" / name).read_text() for name in "abc"}) == 1
