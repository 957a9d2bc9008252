"""The stacked layout: memory-mapped, the same values, and refused if it is not what was written."""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import safetensors.numpy

import moe_jax
from moe_jax import checkpoint, conversion
from moe_jax.checkpoint import huggingface
from tests import tiny_model
from tests.family_variants import VARIANTS, write

TOKENS_BT = np.random.default_rng(0).integers(0, 512, (2, 11), dtype=np.int32)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "published", dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(published):
    conversion.convert(published, published.with_name("stacked"), layout="stacked")
    return published.with_name("stacked")


def places_in(path):
    """The addresses at which a file is mapped in this process."""
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [range(*(int(end, 16) for end in pair)) for pair in ends]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_their_file(folder):
    model = moe_jax.load(folder)
    mapped = places_in(folder / "stacked.safetensors")
    for array in jax.tree.leaves(model.params):
        assert any(array.unsafe_buffer_pointer() in place for place in mapped)


def test_logits_are_those_of_the_published_layout(folder, published):
    given, mapped = moe_jax.load(published), moe_jax.load(folder)
    np.testing.assert_array_equal(mapped.logits(TOKENS_BT), given.logits(TOKENS_BT))
    assert mapped.generate(["The fox"], max_new_tokens=3) == given.generate(["The fox"], max_new_tokens=3)


def test_a_program_that_may_overwrite_its_arguments_leaves_the_file_alone(folder):
    before = (folder / "stacked.safetensors").read_bytes()
    params = checkpoint.open(folder).load()
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params))
    assert (folder / "stacked.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_survives_a_round_trip(tmp_path, name):
    """With small tensors, so that there is padding; the format's own library reads that too."""
    published = write(tmp_path / "published", VARIANTS[name])
    conversion.convert(published, tmp_path / "stacked", layout="stacked")
    opened, given = checkpoint.open(tmp_path / "stacked"), checkpoint.open(published)
    assert opened.architecture == given.architecture and opened.stored_dtype == given.stored_dtype
    jax.tree.map(np.testing.assert_array_equal, opened.read(), given.read())
    jax.tree.map(np.testing.assert_array_equal, opened.read("float32"), given.read("float32"))
    assert all(tensor.start % 64 == 0 for tensor in opened.table.values())
    conversion.convert(tmp_path / "stacked", tmp_path / "back")
    for path in published.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    flat = dict(huggingface.flattened(given.read()))
    theirs = safetensors.numpy.load_file(tmp_path / "stacked" / "stacked.safetensors")
    assert {name for name in theirs if not name.startswith("gap.")} == set(flat)
    for name, array in flat.items():
        np.testing.assert_array_equal(theirs[name], array)


def test_another_dtype_is_read_and_takes_memory(folder, published, monkeypatch):
    expected = moe_jax.load(published, dtype="float32").logits(TOKENS_BT)
    np.testing.assert_array_equal(moe_jax.load(folder, dtype="float32").logits(TOKENS_BT), expected)
    stacked = checkpoint.open(folder)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0}))
    stacked.load()
    with pytest.raises(ValueError, match=r"GB of memory, 0\.0 GB available"):
        stacked.load("float32")


def test_written_with_another_dtype_or_k(folder, published, tmp_path):
    conversion.convert(published, tmp_path / "out", layout="stacked", dtype="float32", policy="topk:3")
    model = moe_jax.load(tmp_path / "out")
    assert model.params["norm_D"].dtype == jnp.float32 and model.architecture.moe.k == 3
    model.save(tmp_path / "again", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.open(tmp_path / "again").read(), moe_jax.load(folder).params)


def cut(length):
    def damage(folder):
        path = folder / "stacked.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:length] if length is not None else data + b"\0")

    return damage


def change_head(folder):
    """Exchanges two parameters of one shape: every check but the digest passes."""
    path = folder / "stacked.safetensors"
    one, other = b'"moe/attention_norm_LD"', b'"moe/ffn_norm_LD"      '
    data = path.read_bytes().replace(one, b'"?"').replace(other.strip(), one).replace(b'"?"', other.strip())
    assert len(data) == path.stat().st_size
    path.write_bytes(data)


def in_json(name, **fields):
    def damage(folder):
        changed = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(changed))

    return damage


DAMAGES = {
    "no bytes": (cut(0), "has 0 bytes: expected [0-9]+, as were written"),
    "cut in its table": (cut(300), "has 300 bytes"),
    "cut in its last number": (cut(-1), "expected [0-9]+, as were written"),
    "a byte more": (cut(None), "expected [0-9]+, as were written"),
    "another table": (change_head, "has another table than was written"),
    "no weights": (lambda folder: (folder / "stacked.safetensors").unlink(), r"stacked\.safetensors is missing"),
    "no description": (lambda folder: (folder / "stacked.json").unlink(), r"has no stacked\.json"),
    "no JSON": (lambda folder: (folder / "stacked.json").write_text("{"), r"stacked\.json is not JSON"),
    "a later format": (in_json("stacked.json", format=2), "format = 2: expected 1"),
    "another shape": (in_json("config.json", hidden_size=32), "config.json asks for"),
    "more layers": (in_json("config.json", num_hidden_layers=4), "config.json asks for"),
    "untied": (in_json("config.json", tie_word_embeddings=False), "1 missing: head_VD"),
    "both": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "holds both"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_changed_file_is_refused_when_it_is_opened(folder, tmp_path, name):
    damage, words = DAMAGES[name]
    copy = pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint.open(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_parameters_that_cannot_be_written_are_refused(published, tmp_path):
    opened = checkpoint.open(published)
    params = opened.read()
    for change, words in (
        ({"norm_D": np.full(64, np.inf, np.float32)}, "norm_D holds NaN or infinity"),
        ({"norm_D": np.ones(64)}, "norm_D is float64"),
        ({"norm_D": np.ones(63, np.float32)}, "norm_D has shape"),
        ({"more": np.ones(64, np.float32)}, "more is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            opened.save(tmp_path / "out", params | change, layout="stacked")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        opened.save(published, params, layout="stacked")
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(published, tmp_path):
    model = moe_jax.load(published)
    with pytest.raises(ValueError, match="layout = 'stackd': expected one of huggingface, stacked"):
        model.checkpoint.save(tmp_path / "out", model.params, layout="stackd")
    assert not (tmp_path / "out").exists()
