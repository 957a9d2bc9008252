"""launch/convert.py in its own process."""

import json

import pytest

from moe_jax import checkpoint
from tests import tiny_model
from tests.faults import launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_fewer_experts_and_another_dtype(folder, tmp_path):
    flags = [f"--set=model.path={folder}", "--set=policy.spec=topk:2", "--set=model.dtype=float16", "--out=out"]
    ended = launched.run("convert", *flags, folder=tmp_path)
    assert ended.status == 0, ended.stderr
    assert "2 of 16 experts active: out/model" in ended.stdout
    fields = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (fields["num_experts_per_tok"], fields["dtype"]) == (2, "float16")
    assert checkpoint.open(tmp_path / "out" / "model").architecture == tiny_model.changed(moe={"k": 2})
    assert json.loads((tmp_path / "out" / "result.json").read_text())["figures"]["experts_per_token"]["value"] == 2


def test_experts_in_eight_bits(folder, tmp_path):
    ended = launched.run(
        "convert", f"--set=model.path={folder}", "--set=model.expert_dtype=float8_e4m3fn", "--out=out", folder=tmp_path
    )
    assert ended.status == 0, ended.stderr
    fields = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert fields["quantization_config"]["weight_block_size"] == [128, 128]
    assert checkpoint.open(tmp_path / "out" / "model").eight_bits("auto") == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set=model.path=nowhere"], "model.path = 'nowhere' does not exist"),
        ([], "model.path = '': expected a folder"),
        (["--to=gguf"], "gguf"),
    ],
)
def test_refusals(tmp_path, flags, says):
    ended = launched.run("convert", *flags, "--out=out", folder=tmp_path)
    assert launched.not_refused(ended, says) == ""
    assert launched.entries(tmp_path) == set()
