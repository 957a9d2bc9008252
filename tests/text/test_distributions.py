"""Sources by name: the standard library, installed distributions, and other names."""

import pathlib
import shutil
import sys
import sysconfig

import pytest

from moe_jax.text import corpus
from tests.text.source_files import unrelated

STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))


def test_standard_library_is_python_source(monkeypatch, tmp_path):
    # a part of it, since the whole takes seconds
    for name in ("json", "html", "encodings", "site-packages"):
        (tmp_path / name).mkdir()
    for name in ("json", "html", "encodings"):
        for path in (STDLIB / name).glob("*.py"):
            shutil.copy(path, tmp_path / name)
    shutil.copy(STDLIB / "json" / "encoder.py", tmp_path / "site-packages")
    (tmp_path / "LICENSE.txt").write_text(unrelated(1))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = corpus.collect(["stdlib"], ())
    names = {document.name for document in found.documents}
    assert {"json/decoder.py", "html/parser.py", "encodings/utf_8.py"} <= names
    assert not any("cp1252" in name or "site-packages" in name or name.endswith(".txt") for name in names)
    assert found.statistics["stdlib"].left_out["generated"] > 50


def test_unknown_source_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'numpi' is neither installed nor a file or folder; did you mean \"numpy\""):
        corpus.collect(["numpi"], ())
    with pytest.raises(ValueError, match='did you mean "stdlib"'):
        corpus.collect(["stdlb"], ())
    with pytest.raises(ValueError, match="a source is empty"):
        corpus.collect([""], ())
    (tmp_path / "small.txt").write_text("1\n")
    with pytest.raises(
        ValueError, match=r"no training text left in .* \(left out: 1 tiny\): name more sources in text"
    ):
        corpus.collect([str(tmp_path)], ())


def install(tmp_path, monkeypatch):
    folder = tmp_path / "madeup-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: madeup\nVersion: 1.0\n")
    (folder / "RECORD").write_text("madeup.py,,\n../../bin/madeup.py,,\nmadeup.txt,,\n")
    (tmp_path / "madeup.py").write_text(unrelated(1))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_an_installed_distribution_is_its_python_files(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    assert [document.name for document in corpus.collect(["madeup"], ()).documents] == ["madeup.py"]
