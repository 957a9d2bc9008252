"""Near-duplicates of the held-out text are found, and other texts are not."""

import importlib.metadata
import pathlib
import sysconfig

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.text import corpus, near_duplicates
from moe_jax.text.documents import Document
from moe_jax.text.held_out import load_held_out
from moe_jax.text.near_duplicates import HeldOutIndex
from tests.text.source_files import unrelated, write

HELD_OUT = pathlib.Path(__file__).parents[2] / "assets" / "text"
STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def held_out():
    return load_held_out(HELD_OUT)


@pytest.fixture(scope="module")
def long_document(held_out):
    return max(held_out, key=lambda document: len(document.text))


def test_held_out_documents_do_not_resemble_one_another(held_out):
    for document in held_out[::80]:
        others = [other for other in held_out if other is not document]
        assert not HeldOutIndex(others).resembles(document), document.name


def test_held_out_files_are_excluded_from_their_source(held_out):
    found = corpus.collect(["gin-config", "absl-py"], held_out)
    taken = {(document.source, document.name) for document in found.documents}
    excluded = {(one.source, one.name) for one in held_out if one.source in ("gin-config", "absl-py")}
    assert excluded and not taken & excluded
    assert sum(one.left_out["held_out"] for one in found.statistics.values()) >= len(excluded)


def test_installed_versions_of_held_out_files_are_found_by_their_shingles(held_out):
    index, found = HeldOutIndex(held_out), []
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
        found.append(index.resembles(Document("elsewhere", "renamed.py", text)))
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
    held_out = [Document("Orbax_Checkpoint", "a/b.py", unrelated(1))]
    index = HeldOutIndex(held_out)
    assert index.resembles(Document("orbax-checkpoint", "a/b.py", unrelated(2)))
    assert not index.resembles(Document("orbax-checkpoint", "a/c.py", unrelated(2)))


def test_a_common_licence_header_does_not_count_as_resemblance():
    header = "\n".join(f"# {unrelated(seed)}" for seed in range(3))
    held_out = [Document("stdlib", str(seed), header + unrelated(seed)) for seed in range(10, 18)]
    fresh = Document("jax", "new.py", header + unrelated(99))
    assert not HeldOutIndex(held_out).resembles(fresh)
    assert HeldOutIndex(held_out[:1]).resembles(fresh)


def test_a_held_out_text_is_excluded_however_often_it_is_held_out():
    held_out = [Document("own", str(number), unrelated(1)) for number in range(near_duplicates.BOILERPLATE_FILES)]
    held_out += [Document("own", f"short {number}", f"!{'?' * number}") for number in range(2)]
    index = HeldOutIndex(held_out)
    assert index.resembles(Document("other", "same", unrelated(1)))
    assert index.resembles(Document("other", "nearly", unrelated(1)[:-40]))
    assert index.resembles(Document("other", "without a word", "!?"))
    assert not index.resembles(Document("other", "apart", "!??"))


@hypothesis.given(st.lists(st.sampled_from(["alpha", "b_2", "été", "日", "本", "x"]), max_size=30), st.randoms())
@hypothesis.settings(deadline=None, max_examples=30)
def test_shingles_are_those_of_the_words(words, draw):
    # words beyond ASCII are one character each
    separated = [part for word in words for part in (word if word[0] > "z" else [word])]
    separated = [part for word in separated for part in {"été": ["é", "t", "é"]}.get(word, [word])]
    width = min(near_duplicates.SHINGLE_WORDS, len(separated))
    expected = (
        {tuple(separated[start : start + width]) for start in range(len(separated) - width + 1)} if width else set()
    )
    text = "".join(word + draw.choice([" ", "\n\t", ", ", "(("]) for word in words)
    hashes = near_duplicates.shingle(text)
    assert len(hashes) == len(expected)
    assert hashes.dtype == np.uint64
    np.testing.assert_array_equal(hashes, near_duplicates.shingle(" - ".join(separated)))


def test_long_texts_are_shingled_in_blocks(monkeypatch):
    text = unrelated(3)
    whole = near_duplicates.shingle(text)
    monkeypatch.setattr(near_duplicates, "_SHINGLED_AT_ONCE", 400)
    blocks = near_duplicates.shingle(text)
    assert np.isin(whole, blocks).mean() > 0.6
