"""The training text is what it says, and nothing that was held out."""

import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import sys
import sysconfig

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.text import corpus, shingles

HELD_OUT = pathlib.Path(__file__).parents[2] / "assets" / "text"
STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def held_out():
    return corpus.load_held_out(HELD_OUT)


@pytest.fixture(scope="module")
def long_document(held_out):
    return max(held_out, key=lambda document: len(document.text))


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return str(folder)


def unrelated(seed):
    words = ["red", "green", "blue", "value", "count", "index", "merge", "split", "left", "right", "token"]
    draw = random.Random(seed)
    return "\n".join(f"{draw.choice(words)}_{draw.choice(words)} = {draw.choice(words)}" for _ in range(60))


# the held-out archive


def test_held_out_text_is_large_and_from_many_sources(held_out):
    manifest = json.loads((HELD_OUT / "MANIFEST.json").read_text())
    sizes = [len(document.text.encode()) for document in held_out]
    sources = {document.source for document in held_out}
    assert len(held_out) >= 200
    assert manifest["bytes"] == sum(sizes) == sum(entry["bytes"] for entry in manifest["files"]) >= 1_000_000
    assert {"stdlib", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "absl-py", "grain"} <= sources
    assert all(entry["version"] for entry in manifest["files"])
    assert {path.stem for path in (HELD_OUT / "LICENSES").iterdir()} == sources
    assert all(path.stat().st_size > 500 for path in (HELD_OUT / "LICENSES").iterdir())


def test_held_out_documents_do_not_resemble_one_another(held_out):
    for document in held_out[::80]:
        others = [other for other in held_out if other is not document]
        assert not corpus.HeldOutIndex(others).resembles(document), document.name


def copy_archive(tmp_path):
    for name in (corpus.ARCHIVE, corpus.MANIFEST):
        shutil.copy(HELD_OUT / name, tmp_path)
    return tmp_path / corpus.ARCHIVE, tmp_path / corpus.MANIFEST


def replace_byte(archive, manifest):
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)


def cut_short(archive, manifest):
    archive.write_bytes(archive.read_bytes()[:-1000])


def empty(archive, manifest):
    archive.write_bytes(b"")


def other_hash(archive, manifest):
    text = manifest.read_text()
    digest = json.loads(text)["files"][7]["sha256"]
    manifest.write_text(text.replace(digest, digest[::-1]))


def one_entry_less(archive, manifest):
    entries = json.loads(manifest.read_text())
    entries["files"].pop()
    manifest.write_text(json.dumps(entries))


def not_json(archive, manifest):
    manifest.write_text("{")


def not_an_object(archive, manifest):
    manifest.write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [replace_byte, cut_short, empty, other_hash, one_entry_less, not_json, not_an_object],
    ids=lambda f: f.__name__,
)
def test_damaged_archive_is_refused(damage, tmp_path):
    damage(*copy_archive(tmp_path))
    with pytest.raises(ValueError, match="damaged") as error:
        corpus.load_held_out(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MANIFEST.json is missing \(text.held_out names the folder\)"):
        corpus.load_held_out(tmp_path)


# near-duplicates


def test_held_out_files_are_excluded_from_their_source(held_out):
    found = corpus.collect(["gin-config", "absl-py"], held_out)
    taken = {(document.source, document.name) for document in found.documents}
    excluded = {(one.source, one.name) for one in held_out if one.source in ("gin-config", "absl-py")}
    assert excluded and not taken & excluded
    assert sum(one.left_out["held_out"] for one in found.statistics.values()) >= len(excluded)


def test_installed_versions_of_held_out_files_are_found_by_their_shingles(held_out):
    index, found = corpus.HeldOutIndex(held_out), []
    for document in held_out[::3]:
        try:
            root = (
                STDLIB
                if document.source == "stdlib"
                else importlib.metadata.distribution(document.source).locate_file("")
            )
            text = pathlib.Path(root, document.name).read_text(encoding="utf-8")
        except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
            continue
        found.append(index.resembles(corpus.Document("elsewhere", "renamed.py", text)))
    assert len(found) > 60
    assert np.mean(found) > 0.95


def test_near_duplicates_are_excluded_and_others_are_not(tmp_path, held_out, long_document):
    text, lines = long_document.text, long_document.text.split("\n")
    few_changed = [f"changed = {number}" if number % 12 == 5 else line for number, line in enumerate(lines)]
    folder = write(
        tmp_path / "files",
        same=text,
        header=f"# Another header.\n# Not the one before.\n\n{text}",
        changed="\n".join(few_changed),
        spaced=text.replace("    ", "\t").replace("\n", "\r\n"),
        part="\n".join(lines[len(lines) // 3 :]),
        excerpt="\n".join(lines[: len(lines) // 8]),
        within="\n\n".join(unrelated(seed) for seed in range(200)) + text,
        apart=unrelated(1000),
    )
    found = corpus.collect([folder], held_out)
    assert [document.name for document in found.documents] == ["apart.py"]
    assert found.statistics[folder].left_out == {"held_out": 7}


def test_another_version_of_a_held_out_file_is_excluded_by_its_name():
    held_out = [corpus.Document("Orbax_Checkpoint", "a/b.py", unrelated(1))]
    index = corpus.HeldOutIndex(held_out)
    assert index.resembles(corpus.Document("orbax-checkpoint", "a/b.py", unrelated(2)))
    assert not index.resembles(corpus.Document("orbax-checkpoint", "a/c.py", unrelated(2)))


def test_a_common_licence_header_is_no_resemblance():
    header = "\n".join(f"# {unrelated(seed)}" for seed in range(3))
    held_out = [corpus.Document("stdlib", str(seed), header + unrelated(seed)) for seed in range(10, 18)]
    fresh = corpus.Document("jax", "new.py", header + unrelated(99))
    assert not corpus.HeldOutIndex(held_out).resembles(fresh)
    assert corpus.HeldOutIndex(held_out[:1]).resembles(fresh)


@hypothesis.given(st.lists(st.sampled_from(["alpha", "b_2", "été", "日", "本", "x"]), max_size=30), st.randoms())
@hypothesis.settings(deadline=None, max_examples=30)
def test_shingles_are_those_of_the_words(words, draw):
    # words beyond ASCII are one character each
    separated = [part for word in words for part in (word if word[0] > "z" else [word])]
    separated = [part for word in separated for part in {"été": ["é", "t", "é"]}.get(word, [word])]
    width = min(shingles.SHINGLE_WORDS, len(separated))
    expected = (
        {tuple(separated[start : start + width]) for start in range(len(separated) - width + 1)} if width else set()
    )
    text = "".join(word + draw.choice([" ", "\n\t", ", ", "(("]) for word in words)
    hashes = shingles.shingle(text)
    assert len(hashes) == len(expected)
    assert hashes.dtype == np.uint64
    np.testing.assert_array_equal(hashes, shingles.shingle(" - ".join(separated)))


def test_long_texts_are_shingled_in_blocks(monkeypatch):
    text = unrelated(3)
    whole = shingles.shingle(text)
    monkeypatch.setattr(shingles, "_SHINGLED_AT_ONCE", 400)
    blocks = shingles.shingle(text)
    assert np.isin(whole, blocks).mean() > 0.6


# what is taken, and what is left out


def test_files_that_nobody_wrote_are_left_out(tmp_path):
    folder = tmp_path / "mixed"
    write(
        folder,
        good=unrelated(1),
        twin=unrelated(1),
        small="x = 1\n",
        table="TABLE = [\n" + "    0x1f, 0x2e, 0x3d, 0x4c,\n" * 50 + "]\n",
        line=f"WORDS = '{'some words ' * 200}'\n" + unrelated(2),
        numbers=unrelated(2) + "\n1.5e-3, 2.75, 3.0, 4.125\n" * 100,
        made="# Auto-generated by make_tables.py\n" + unrelated(3),
        edit='"""Tokens. DO NOT EDIT."""\n' + unrelated(4),
        message_pb2=unrelated(5),
    )
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)
    (folder / "zeros.txt").write_bytes(b"abc\0" * 100)
    (folder / ".hidden").write_text(unrelated(6))
    os.mkfifo(folder / "pipe")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text(unrelated(7))
    (folder / "chinese.txt").write_text("天地玄黄宇宙洪荒日月盈昃辰宿列张" * 40, encoding="utf-8")
    found = corpus.collect([str(folder)], ())
    assert [document.name for document in found.documents] == ["chinese.txt", "good.py"]
    assert found.statistics[str(folder)] == corpus.SourceStatistics(
        files=2,
        bytes=len(unrelated(1)) + 16 * 3 * 40,
        left_out={"binary": 2, "data": 3, "duplicate": 1, "generated": 3, "tiny": 1},
    )
    assert found.num_bytes == found.statistics[str(folder)].bytes


def test_text_is_kept_byte_for_byte(tmp_path):
    data = ("\ufeff" + unrelated(1).replace("\n", "\r\n") + "\x85\u2028\x0c").encode()
    (tmp_path / "odd.txt").write_bytes(data)
    assert corpus.collect([str(tmp_path)], ()).documents[0].text.encode() == data


def test_order_and_hash_do_not_depend_on_the_order_of_sources(tmp_path):
    sources = [write(tmp_path / "b", z=unrelated(1), a=unrelated(2)), write(tmp_path / "a", m=unrelated(3))]
    found, again = corpus.collect(sources, ()), corpus.collect(sources[::-1] + sources, ())
    assert found == again
    assert [document.name for document in found.documents] == ["m.py", "a.py", "z.py"]
    write(tmp_path / "b", z=unrelated(1) + "\n")
    assert corpus.collect(sources, ()).sha256 != found.sha256


def test_a_file_named_itself_is_taken_as_it_is(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("1 2 3\n")
    assert corpus.collect([str(path)], ()).documents[0] == corpus.Document(str(path), "one.txt", "1 2 3\n")
    path.write_bytes(b"\xff\xfe1\0")
    with pytest.raises(ValueError, match=r"is binary; wanted a readable text file in UTF-8"):
        corpus.collect([str(path)], ())


def test_standard_library_is_python_source(monkeypatch, tmp_path, held_out):
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


# sources that cannot be read


def test_unknown_source_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'numpi' is neither installed nor a file or folder; did you mean \"numpy\""):
        corpus.collect(["numpi"], ())
    with pytest.raises(ValueError, match='did you mean "stdlib"'):
        corpus.collect(["stdlb"], ())
    with pytest.raises(ValueError, match="a source is empty"):
        corpus.collect([""], ())
    with pytest.raises(ValueError, match="no training text left in"):
        corpus.collect([str(tmp_path)], ())


def install(tmp_path, monkeypatch, *lines):
    folder = tmp_path / "madeup-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", "Name: madeup", "Version: 1.0", *lines]) + "\n"
    )
    (folder / "RECORD").write_text("madeup.py,,\n../../bin/madeup.py,,\nmadeup.txt,,\n")
    (tmp_path / "madeup.py").write_text(unrelated(1))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.parametrize(
    "lines",
    [
        ["License-Expression: MIT"],
        ["License-Expression: Apache-2.0 OR GPL-3.0-only"],
        ["License-Expression: (BSD-3-Clause AND Zlib)", "Classifier: License :: Other/Proprietary License"],
        ["License-Expression: Apache-2.0 WITH LLVM-exception"],
        ["Classifier: License :: OSI Approved :: BSD License"],
        ["Classifier: License :: OSI Approved", "License: BSD-3-Clause"],
        ["License: Apache License"],
    ],
)
def test_permissive_distributions_are_read(lines, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, *lines)
    assert [document.name for document in corpus.collect(["madeup"], ()).documents] == ["madeup.py"]


@pytest.mark.parametrize(
    "lines",
    [
        ["License-Expression: MPL-2.0 AND MIT"],
        ["License-Expression: GPL-3.0-only"],
        ["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"],
        [
            "Classifier: License :: OSI Approved :: MIT License",
            "Classifier: License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
        ],
        ["License: MIT or GPL"],
        [],
    ],
)
def test_other_distributions_are_refused(lines, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, *lines)
    with pytest.raises(ValueError, match=r"the licence of 'madeup' is .*; wanted a permissive one") as error:
        corpus.collect(["madeup"], ())
    assert "\n" not in str(error.value)
