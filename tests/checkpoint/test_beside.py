"""The files beside a model's weights are kept when the model is saved, converted or tuned."""

import json
import shutil

import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint, conversion
from moe_jax.checkpoint import beside, huggingface
from moe_jax.routing import calibration as calibrations
from tests import tiny_model

GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "bos_token_id": 0,
    "eos_token_id": [0, 7],
    "pad_token_id": 7,
    "transformers_version": "4.51.0",
}
FIELDS = {  # fields of published files that change nothing here
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.001,
    "use_cache": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"},
    "bos_token_id": 0,
    "eos_token_id": 0,  # one of those that generation_config.json gives
    "pad_token_id": None,
    "transformers_version": "4.51.0",
}
FILES = {
    "LICENSE": b"MIT",
    "README.md": b"# Tiny",
    "modeling_tiny.py": b"class TinyForCausalLM: ...",
    "tiktoken.model": b"\x00\xff",
    "chat_template.jinja": b"{{ messages }}",
    "preprocessor_config.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
LEFT = {"pytorch_model.bin": b"weights", "model.safetensors.index.json": b"{}", ".gitattributes": b"* lfs", "a/b": b"c"}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like that of a published model, with a calibration."""
    folder = tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", dtype="bfloat16", token_ids={})
    for name, data in {**FILES, **LEFT}.items():
        write(folder / name, data)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**FIELDS, **config, "num_nextn_predict_layers": 1})
    write(folder / "generation_config.json", GENERATION)
    routers = checkpoint.open(folder).read()["moe"]["router"]["weight_LED"]
    measured = calibrations.Calibration(
        np.full(2, 0.5, np.float32), np.zeros((2, 16, 16), np.float32), calibrations.sample_of(routers)
    )
    calibrations.save(folder / calibrations.NAME, measured)
    return folder


def saved(folder, out, **options):
    moe_jax.load(folder).save(out, **options)
    return out


def converted(folder, out, **options):
    conversion.convert(folder, out, **options)
    return out


def by_way_of_orbax(folder, out, **options):
    conversion.convert(folder, out.with_name("orbax"), layout="orbax", **options)
    return converted(out.with_name("orbax"), out)


def by_way_of_stacked(folder, out, **options):
    conversion.convert(folder, out.with_name("stacked"), layout="stacked", **options)
    return saved(out.with_name("stacked"), out)


WAYS = [saved, converted, by_way_of_orbax, by_way_of_stacked]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_files_and_fields_survive(folder, tmp_path, way, dtype):
    out = way(folder, tmp_path / "out", dtype=dtype)
    own = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", calibrations.NAME)
    for name in (*FILES, *own):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {*FILES, *own, "config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((out / "generation_config.json").read_text()) == GENERATION
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    expected = "bfloat16" if dtype == "auto" else "float32"
    changed = {"num_nextn_predict_layers": 0, "dtype": expected, "torch_dtype": expected, "pad_token_id": 7}
    assert after == {**before, **changed}
    assert checkpoint.open(out).token_ids == checkpoint.open(folder).token_ids
    assert moe_jax.load(out).calibration is not None


@pytest.mark.parametrize("way", WAYS[1:])
def test_another_k_is_written_and_drops_the_calibration(folder, tmp_path, way):
    out = way(folder, tmp_path / "out", policy="topk:3")
    fields = json.loads((out / "config.json").read_text())
    assert fields["num_experts_per_tok"] == 3 and fields["router_aux_loss_coef"] == 0.001
    assert not (out / calibrations.NAME).exists() and (out / "LICENSE").exists()
    per_layer = converted(folder, tmp_path / "layers", policy="layers:4,2")
    again = converted(per_layer, tmp_path / "again", policy="topk:2")
    assert "num_experts_per_tok_of_layers" not in json.loads((again / "config.json").read_text())


def test_a_dequantised_checkpoint_has_no_quantization_config(folder):
    texts = huggingface.config_texts(
        {"hidden_size": 4}, np.dtype(np.float32), {}, {"quantization_config": {"quant_method": "fp8"}, "a": 1}, {}
    )
    assert json.loads(texts["config.json"]) == {"a": 1, "hidden_size": 4, "dtype": "float32"}


def test_a_large_file_is_not_copied_with_a_warning(folder, tmp_path, monkeypatch, caplog):
    copy = shutil.copytree(folder, tmp_path / "copy")
    write(copy / "corpus.txt", b"x" * 500_000)
    monkeypatch.setattr(beside, "LARGEST_BYTES", 400_000)
    assert "corpus.txt" not in checkpoint.open(copy).files
    assert "corpus.txt has more than" in caplog.text


def test_new_weights_drop_the_calibration_and_the_pages_about_the_old_ones(folder):
    files = checkpoint.open(folder).for_new_weights().files
    assert {"LICENSE", "modeling_tiny.py", "tokenizer.json"} <= files.keys()
    assert not {"README.md", calibrations.NAME} & files.keys()
