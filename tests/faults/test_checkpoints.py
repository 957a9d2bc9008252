"""Damaged models are refused in one line before an array is made; if the table is damaged, before a tensor is read."""

import os
import shutil

import hypothesis
import jax
import pytest
from hypothesis import strategies

import moe_jax
from moe_jax.checkpoint import filling
from tests import tiny_model
from tests.faults import damage, launched


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Whether it is sharded -> an undamaged model."""
    whole = tmp_path_factory.mktemp("models") / "whole"
    tiny_model.write_model(whole)
    shutil.copytree(whole, whole.parent / "sharded")
    damage.shard(whole.parent / "sharded")
    return {False: whole, True: whole.parent / "sharded"}


def damaged(folders, one, folder):
    shutil.copytree(folders[one.sharded], folder / "tiny")
    one.harm(folder / "tiny")
    return folder / "tiny"


@pytest.fixture
def no_arrays(monkeypatch):
    """Moving anything to a device fails."""

    def refuse(*arguments, **options):
        raise AssertionError("an array is made")

    monkeypatch.setattr(jax, "device_put", refuse)
    before = len(jax.live_arrays())
    yield refuse
    assert len(jax.live_arrays()) == before


def test_undamaged_models_load(folders):
    for folder in folders.values():
        assert moe_jax.load(folder).architecture == tiny_model.ARCHITECTURE


def test_there_are_fifty_kinds_of_damage():
    names = [one.name for one in damage.DAMAGES]
    assert len(set(names)) == len(names) >= 50
    assert sum(one.sharded for one in damage.DAMAGES) >= 8


@pytest.mark.parametrize("one", damage.DAMAGES, ids=lambda one: one.name)
def test_a_damaged_model_does_not_load(folders, tmp_path, monkeypatch, no_arrays, one):
    folder = damaged(folders, one, tmp_path)
    if not one.told_by_data:
        monkeypatch.setattr(filling, "allocate", no_arrays)
    with pytest.raises(ValueError, match=one.says) as refusal:
        moe_jax.load(folder)
    assert len(str(refusal.value)) < 2000


@pytest.mark.slow
def test_a_launcher_refuses_damaged_models_in_one_line_and_writes_nothing(folders, tmp_path):
    def run(numbered):
        number, one = numbered
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged(folders, one, folder)
        before = launched.entries(folder)
        flags = ["--set=model.path=tiny", "--prompt=The", "--out=out"]
        ended = launched.run("infer", *flags, folder=folder, timeout=60)
        problem = launched.not_refused(ended, one.says)
        if launched.entries(folder) != before:
            problem += f"; written: {launched.entries(folder) - before}"
        return f"{one.name}: {problem}" if problem else ""

    assert [problem for problem in launched.two_at_a_time(run, enumerate(damage.DAMAGES)) if problem] == []


@pytest.mark.processes
def test_a_launcher_refuses_nan_in_one_line_and_writes_nothing(folders, tmp_path):
    (one,) = [one for one in damage.DAMAGES if one.name == "NaN"]
    damaged(folders, one, tmp_path)
    before = launched.entries(tmp_path)
    flags = ["--set=model.path=tiny", "--prompt=The", "--out=out"]
    ended = launched.run("infer", *flags, folder=tmp_path)
    assert launched.not_refused(ended, one.says) == ""
    assert launched.entries(tmp_path) == before


@pytest.mark.processes
@pytest.mark.parametrize("file", [damage.WEIGHTS, damage.CONFIG, damage.TOKENIZER])
def test_an_unreadable_file_is_refused_in_one_line(folders, tmp_path, file):
    """Root can read everything, except from a namespace in which it is another user."""
    shutil.copytree(folders[False], tmp_path / "tiny")
    (tmp_path / "tiny" / file).chmod(0)
    within = ["unshare", "-U"] if os.geteuid() == 0 else []
    flags = ["--set=model.path=tiny", "--prompt=The"]
    ended = launched.run("infer", *flags, folder=tmp_path, within=within)
    if "unshare" in ended.stderr:
        pytest.skip(f"root reads every file here: {ended.stderr}")
    assert launched.not_refused(ended, f"{file}.* Permission denied") == ""


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=strategies.data())
def test_flipped_bits_of_a_table_and_truncation_are_refused(folders, tmp_path_factory, data):
    """Any bit outside the metadata, and any length."""
    sound = folders[False] / damage.WEIGHTS
    content, end = bytearray(sound.read_bytes()), 8 + damage.table_bytes(sound)
    if data.draw(strategies.booleans(), "cut"):
        content = content[: data.draw(strategies.integers(0, end + 100) | strategies.integers(0, len(content) - 1))]
    else:
        position = data.draw(strategies.integers(0, 7) | strategies.integers(content.index(b"}") + 2, end - 1))
        content[position] ^= 1 << data.draw(strategies.integers(0, 7))
    folder = tmp_path_factory.mktemp("cut") / "tiny"
    folder.mkdir()
    for file in (damage.CONFIG, "generation_config.json"):
        (folder / file).symlink_to(folders[False] / file)
    (folder / damage.WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="tiny"):
        moe_jax.load(folder)
