"""Block-scaled FP8: read as by a plain loop, in every dtype, and refused if scales and tensors do not fit."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint
from moe_jax.checkpoint import filling, huggingface, reading
from moe_jax.checkpoint.families import FAMILIES
from moe_jax.checkpoint.quantization import blocks_of
from moe_jax.checkpoint.safetensors_file import read_table
from tests.checkpoint.tiny_folder import TINY, edit_config, edit_tensors, flattened, random_params, refusal, shard

ROWS, COLUMNS = 7, 5  # of a block: no dimension of the model is a multiple of either
PUBLISHED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DOWN = "model.layers.3.mlp.experts.5.down_proj.weight"


def plain_loop(tensor, scale, rows, columns):
    """The values in float32, one by one."""
    expected = np.empty(tensor.shape, np.float32)
    for row in range(tensor.shape[0]):
        for column in range(tensor.shape[1]):
            expected[row, column] = np.float32(tensor[row, column]) * scale[row // rows, column // columns]
    return expected


def quantize(folder, rows=ROWS, columns=COLUMNS, scale_dtype=np.float32):
    """Stores the projections as random FP8 with random scales; returns the expected values in float32."""
    random = np.random.default_rng(0)
    tensors, expected = safetensors.numpy.load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if "_proj.weight" in name:
            bits = random.integers(0, 256, tensor.shape, np.uint8)
            bits[(bits & 0x7F) == 0x7F] = 0  # NaN
            tensors[name] = bits.view(ml_dtypes.float8_e4m3fn)
            shape = -(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns)
            scale = random.uniform(1e-4, 1e-2, shape).astype(scale_dtype)
            tensors[f"{name}_scale_inv"] = scale
            expected[name] = plain_loop(tensors[name], scale.astype(np.float32), rows, columns)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={**PUBLISHED, "weight_block_size": [rows, columns]})
    return expected


def load_file(path):
    """Reads like the format's own library, which cannot give 8-bit floats to NumPy."""
    data = path.read_bytes()
    return {
        name: np.frombuffer(data, one.dtype, one.nbytes // one.dtype.itemsize, one.start).reshape(one.shape).copy()
        for name, one in read_table(path).items()
    }


@pytest.fixture
def folder(tmp_path):
    params = huggingface.nested(random_params(TINY, ml_dtypes.bfloat16))
    huggingface.write_checkpoint(tmp_path / "model", TINY, params)
    return tmp_path / "model"


def as_stored(params):
    """Tensors by the names that `write_checkpoint` gives them."""
    flat = flattened(params)
    return {
        name: flat[rule.parameter][index].reshape(rule.stored_shape(TINY))
        for rule in FAMILIES["glm4_moe"].rules(TINY)
        for name, index in rule.placements(TINY)
    }


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32", "float16"])
@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (8, 16), (128, 128)])
def test_values_are_those_of_a_plain_loop(folder, monkeypatch, dtype, rows, columns):
    monkeypatch.setattr(filling, "_CHECKED_BYTES", 200)  # so that chunks begin within blocks
    expected = quantize(folder, rows, columns)
    read = as_stored(checkpoint.open(folder).read(dtype))
    for name, values in expected.items():
        narrow = np.dtype("bfloat16" if dtype == "auto" else dtype)
        assert read[name].dtype == narrow
        np.testing.assert_array_equal(read[name], values.astype(narrow), err_msg=name)
    assert read["model.norm.weight"].dtype == np.dtype("bfloat16" if dtype == "auto" else dtype)


def test_a_part_equals_that_part_of_the_whole(folder):
    quantize(folder)
    opened = checkpoint.open(folder)
    expected = flattened(opened.read("float32"))
    stacks = opened._stacks("float32")
    parts = [[tuple(slice(size // 3, size // 3 + 1 + size // 2) for size in stack.shape)] for stack in stacks]
    arrays = reading.read(folder, stacks, parts, blocks_of(opened.config))
    for stack, [part], [array] in zip(stacks, parts, arrays):
        np.testing.assert_array_equal(array, expected[stack.path][part], err_msg=stack.path)


def test_a_part_of_the_rows_is_read_without_the_others(folder, monkeypatch):
    quantize(folder)
    opened = checkpoint.open(folder)
    [stack] = [one for one in opened._stacks("float32") if one.path == "moe/attention/query_LHAD"]
    read, dequantize = [], filling.dequantize
    monkeypatch.setattr(
        filling, "dequantize", lambda values, *rest: [read.append(len(values)), dequantize(values, *rest)][1]
    )
    layers, heads, width, inputs = stack.shape
    reading.read(folder, [stack], [[np.s_[0:layers, 1:2, 0:width, 0:inputs]]], blocks_of(opened.config))
    assert heads > 1 and sum(read) == layers * width


def test_scales_may_be_narrow_and_lie_in_another_shard(folder, monkeypatch):
    expected = quantize(folder, scale_dtype=ml_dtypes.bfloat16)
    monkeypatch.setattr(safetensors.numpy, "load_file", load_file)
    shard(folder)
    read = as_stored(checkpoint.open(folder).read())
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values.astype(ml_dtypes.bfloat16), err_msg=name)


def test_fields_that_newer_libraries_add_change_nothing(folder):
    expected = quantize(folder)
    added = {"dequantize": False, "modules_to_convert": None, "expert_dtype": "fp8", "scale_fmt": "float"}
    edit_config(folder, quantization_config={**PUBLISHED, "weight_block_size": [ROWS, COLUMNS], **added})
    read = as_stored(checkpoint.open(folder).read("float32"))
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values, err_msg=name)
    for field, value in (("dequantize", True), ("expert_dtype", "fp4")):
        given = {**PUBLISHED, "weight_block_size": [ROWS, COLUMNS], field: value}
        edit_config(folder, quantization_config=given)
        assert f"quantization_config.{field} = {json.dumps(value)}: not implemented" in refusal(folder)


def without_scale(tensors):
    del tensors[f"{DOWN}_scale_inv"]


def with_transposed_scale(tensors):
    tensors[f"{DOWN}_scale_inv"] = np.ascontiguousarray(tensors[f"{DOWN}_scale_inv"].T)


def with_scale_of_nothing(tensors):
    tensors["model.norm.weight_scale_inv"] = np.ones((1, 1), np.float32)


def with_nan(tensors):
    tensors[DOWN].view(np.uint8)[-1, -1] = 0x7F


def with_infinite_scale(tensors):
    tensors[f"{DOWN}_scale_inv"][-1, -1] = np.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scale, f"{DOWN} is F8_E4M3, and its scales {DOWN}_scale_inv are missing"),
        (with_transposed_scale, f"{DOWN}_scale_inv has shape (2, 3)"),
        (with_scale_of_nothing, "model.norm.weight_scale_inv scales no tensor"),
        (with_nan, f"{DOWN} holds NaN"),
        (with_infinite_scale, f"{DOWN} holds NaN or infinity"),
    ],
)
def test_scales_and_tensors_that_do_not_fit_are_refused(folder, monkeypatch, change, words):
    quantize(folder)
    monkeypatch.setattr(safetensors.numpy, "load_file", load_file)
    edit_tensors(folder, change)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"quant_method": "gptq"}, 'quant_method = "gptq"'),
        ({"quant_method": None}, "quant_method = null"),
        ({"fmt": "e5m2"}, 'fmt = "e5m2"'),
        ({"weight_block_size": None}, "weight_block_size = null"),
        ({"weight_block_size": [128, 0]}, "weight_block_size = [128, 0]"),
        ({"bits": 4}, "quantization_config.bits = 4: not implemented"),
    ],
)
def test_other_quantisations_are_refused_by_name(folder, changed, words):
    edit_config(folder, quantization_config=PUBLISHED | changed)
    message = refusal(folder)
    assert words in message and "config.json" in message and "e4m3" in message


def test_eight_bits_need_a_quantization_config(folder):
    quantize(folder)
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert "config.json has no quantization_config for it" in refusal(folder)


def test_a_published_config_of_a_model_that_is_not_quantised_reads(folder):
    before = checkpoint.open(folder).architecture
    edit_config(folder, quantization_config=PUBLISHED)
    assert checkpoint.open(folder).architecture == before
    checkpoint.open(folder).read()
