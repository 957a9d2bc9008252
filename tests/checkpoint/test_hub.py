"""Models of a hub, from a small server on the loopback: fetched, found in the cache, refused in one line."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import moe_jax
from moe_jax import checkpoint
from tests import small_hub, tiny_model

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
SHARDS = {f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in one file, one in shards, and files that must not be fetched."""
    models = tmp_path_factory.mktemp("models")
    one = tiny_model.write_model(models / "one")
    tiny_model.write_model(models / "shards", shard_bytes=300_000)
    for folder in (one, models / "shards"):
        (folder / "pytorch_model.bin").write_bytes(b"pickled")
        (folder / "modeling_tiny.py").write_text("raise SystemExit")
        (folder / "original").mkdir()
        shutil.copy(one / "model.safetensors", folder / "original" / "model.safetensors")
    for name, dropped in (("pickled", "model.safetensors"), ("bare", "config.json")):
        shutil.copytree(one, models / name)
        (models / name / dropped).unlink()
    return {f"tiny/{path.name}": path for path in models.iterdir()}


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with small_hub.serving(folders) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between two tries
        yield hub


def refusal(name):
    with pytest.raises(ValueError) as caught:
        checkpoint.open(name).read()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["tiny/one", "tiny/shards@main", f"tiny/one@{small_hub.COMMIT}"])
def test_a_name_is_fetched_once(hub, folders, name):
    opened = checkpoint.open(name)
    assert set(hub.sent) - {"model.safetensors.index.json"} == SMALL  # no weights before they are needed
    loaded = opened.load()
    weights = SHARDS | {"model.safetensors.index.json"} if "shards" in name else {"model.safetensors"}
    assert sorted(hub.sent) == sorted(SMALL | weights)
    expected = checkpoint.open(folders[name.partition("@")[0]]).read()
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    checkpoint.open(name).read()
    assert len(hub.sent) == len(SMALL | weights)


@pytest.mark.parametrize("how", ["closed", "offline", 500])
def test_the_cache_serves_when_the_hub_does_not(hub, monkeypatch, caplog, how):
    given = moe_jax.load("tiny/one")
    if how == "closed":
        hub.close()
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.status = how
    jax.tree.map(np.testing.assert_array_equal, moe_jax.load("tiny/one").params, given.params)
    assert "tiny/one is taken from the cache: " in caplog.text
    message = refusal("tiny/shards")
    assert "'tiny/shards' is not a folder" in message and "lacks all of it" in message
    assert ("HF_HUB_OFFLINE is set" if how == "offline" else f"{hub.endpoint} does not answer") in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny/nowhere", "has no such model"),
        ("tiny/one@v2", "has no such revision"),
        ("tiny/pickled", r"tiny/pickled at main has only pickled weights (pytorch_model.bin)"),
        ("tiny/bare", "tiny/bare at main has no config.json"),
    ],
)
def test_a_model_that_the_hub_does_not_have_is_refused_by_name(hub, name, words):
    assert words in refusal(name)
    assert not hub.sent


def test_a_partial_download_is_resumed(hub, folders, monkeypatch):
    """After a connection that ended early, and in another process."""
    broken = "model-00002-of-00004.safetensors"
    hub.cut = {broken: 100_000}
    assert f"tiny/shards: {broken} cannot be fetched" in refusal("tiny/shards")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"lacks {broken}" in refusal("tiny/shards")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cut, hub.sent = {}, []
    expected = checkpoint.open(folders["tiny/shards"]).read()
    jax.tree.map(np.testing.assert_array_equal, checkpoint.open("tiny/shards").read(), expected)
    assert broken in hub.sent and not SMALL & set(hub.sent)


def test_a_folder_comes_first(hub, folders, tmp_path, monkeypatch):
    shutil.copytree(folders["tiny/one"], tmp_path / "tiny" / "one")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.open("tiny/one").folder == pathlib.Path("tiny/one") and not hub.sent
    for path in ("./tiny/two", "tiny/two/three", str(tmp_path / "tiny" / "two")):
        assert "does not exist" in refusal(path)


def test_launchers_take_a_name(folders, tmp_path):
    def launched(name, *flags, offline="0"):
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
        command_line = [sys.executable, str(ROOT / "launch" / name), "--set=model.path=tiny/one", *flags]
        return subprocess.run(command_line, env=environment, capture_output=True, text=True, cwd=tmp_path)

    with small_hub.serving(folders) as hub:
        refused = launched("infer.py", "--prompt=The", offline="1")
        assert refused.returncode == 2
        last = refused.stderr.splitlines()[-1]
        assert last.startswith("error: model.path = 'tiny/one' is not a folder") and "HF_HUB_OFFLINE is set" in last
        mistaken = launched("infer.py", "--prompt=The", "--set=policy.spec=tpok:2")
        assert mistaken.returncode == 2 and "did you mean" in mistaken.stderr.splitlines()[-1]
        assert set(hub.sent) == SMALL  # a mistake is reported before weights are fetched
        converted = launched("convert.py", "--out=out")
    assert converted.returncode == 0, converted.stderr
    written, given = (path / "model.safetensors" for path in (tmp_path / "out" / "model", folders["tiny/one"]))
    assert written.read_bytes() == given.read_bytes()
