import pathlib

import pytest

from moe_jax.command import folders


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """In this process: root ignores permission bits, so writing is made to fail."""

    def read_only(self, data):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "write_bytes", read_only)
    with pytest.raises(ValueError, match="Read-only file system; expected a folder"):
        folders.open_folder(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    repository = pathlib.Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    assert folders.in_repository("configs") == repository / "configs"
    (tmp_path / "configs").mkdir()
    assert folders.in_repository("configs") == pathlib.Path("configs")
    assert folders.in_repository("nowhere") == pathlib.Path("nowhere")
    with pytest.raises(ValueError, match=r"text\.held_out = '': expected a folder"):
        folders.in_repository("", "text.held_out")
