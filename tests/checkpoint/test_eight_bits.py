"""Experts in eight bits in memory: as stored or quantised while they are read, on a mesh, saved, and refused."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import moe_jax
from moe_jax import checkpoint, conversion, memory
from moe_jax.checkpoint import filling, huggingface, reading
from moe_jax.checkpoint.quantization import Blocks, blocks_of
from moe_jax.checkpoint.safetensors_file import read_table
from moe_jax.kernels.quantized import Quantized, holds_any
from tests import tiny_model
from tests.checkpoint.test_layouts import edited, stacked
from tests.checkpoint.test_quantization import as_stored, load_file, quantize
from tests.checkpoint.tiny_folder import TINY, edit_tensors, flattened, random_params
from tests.kernels.eight_bits import plain
from tests.kernels.test_quantized import plain_quantize

ROOT = pathlib.Path(__file__).parents[2]
EXPERTS = ("moe/experts/gate_up_LEIFD", "moe/experts/down_LEDF")
DOWN = "model.layers.3.mlp.experts.5.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    params = huggingface.nested(random_params(TINY, ml_dtypes.bfloat16))
    huggingface.write_checkpoint(tmp_path / "model", TINY, params)
    return tmp_path / "model"


def wide(weight):
    """As an array, by a loop over every number; an array as it is."""
    return plain(weight.values, weight.scale, weight.block) if isinstance(weight, Quantized) else weight


def all_wide(params):
    return huggingface.nested({path: wide(array) for path, array in flattened(params).items()})


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (8, 16), (128, 128)])
@pytest.mark.parametrize("asked", ["auto", "float8_e4m3fn"])
def test_stored_values_and_scales_are_kept(folder, monkeypatch, asked, rows, columns):
    monkeypatch.setattr(filling, "_CHECKED_BYTES", 200)  # several steps for each matrix
    expected = quantize(folder, rows, columns)
    monkeypatch.setattr(safetensors.numpy, "load_file", load_file)
    tensors = load_file(folder / "model.safetensors")
    opened = checkpoint.open(folder)
    params = flattened(opened.read("auto", asked))
    assert opened.eight_bits(asked) == "float8_e4m3fn" and opened.eight_bits("model") == ""
    assert {path for path, array in params.items() if isinstance(array, Quantized)} == set(EXPERTS)
    read = as_stored(all_wide(huggingface.nested(params)))
    values = as_stored(huggingface.nested({path: getattr(array, "values", array) for path, array in params.items()}))
    names = [name for name in expected if ".experts." in name]
    assert len(names) == 2 * 8 * 3
    for name in names:
        np.testing.assert_array_equal(read[name].astype(np.float32), expected[name], err_msg=name)
        np.testing.assert_array_equal(values[name].view(np.uint8), tensors[name].view(np.uint8), err_msg=name)
    for name in expected.keys() - set(names):  # of attention and shared experts
        np.testing.assert_array_equal(read[name], expected[name].astype(ml_dtypes.bfloat16), err_msg=name)


@pytest.mark.parametrize("layout", ["huggingface", "stacked", "experts in one tensor"])
@pytest.mark.parametrize("asked", ["int8", "float8_e4m3fn"])
def test_wide_weights_are_quantised_matrix_by_matrix(folder, tmp_path, monkeypatch, asked, layout):
    monkeypatch.setattr(filling, "_CHECKED_BYTES", 600)
    before = flattened(checkpoint.open(folder).read("float32"))
    if layout == "stacked":
        conversion.convert(folder, tmp_path / "other", layout="stacked")
        folder = tmp_path / "other"
    elif layout != "huggingface":
        edited(folder, stacked)
    read = flattened(checkpoint.open(folder).read("auto", asked))
    for path in EXPERTS:
        block = (128, 128) if asked == "float8_e4m3fn" else (1, before[path].shape[-1])
        for place in np.ndindex(before[path].shape[:-2]):
            values, scale = plain_quantize(before[path][place], asked, block)
            np.testing.assert_array_equal(read[path].values[place].astype(np.float32), values)
            np.testing.assert_array_equal(read[path].scale[place], scale)
    assert read["norm_D"].dtype == ml_dtypes.bfloat16


def test_fp8_may_become_int8_and_all_or_no_experts_are_kept(folder, monkeypatch):
    expected = quantize(folder)
    read = as_stored(all_wide(checkpoint.open(folder).read("auto", "int8")))
    largest = np.abs(expected[DOWN]).max(axis=1, keepdims=True)
    assert (np.abs(read[DOWN] - expected[DOWN]) <= largest / 127 / 2 * 1.00001).all()
    monkeypatch.setattr(safetensors.numpy, "load_file", load_file)

    def with_one_wide(tensors):
        tensors[DOWN] = expected[DOWN].astype(ml_dtypes.bfloat16)
        del tensors[f"{DOWN}_scale_inv"]

    edit_tensors(folder, with_one_wide)
    opened = checkpoint.open(folder)
    assert opened.eight_bits("auto") == "" and not holds_any(opened.read("auto", "auto"))
    both = opened.read("auto", "float8_e4m3fn")  # that one is quantised, in blocks of the same size
    got = as_stored(all_wide(both))[DOWN]
    assert np.abs(got - expected[DOWN]).max() < np.abs(expected[DOWN]).max() / 16


@pytest.mark.parametrize(
    ("stored", "asked"), [(True, "auto"), (True, "int8"), (False, "int8"), (False, "float8_e4m3fn")]
)
def test_a_part_equals_that_part_of_the_whole(folder, stored, asked):
    if stored:
        quantize(folder, 5, 4)  # of [10, 16] and of [16, 10], which has blocks of 1 x 2 then
    opened = checkpoint.open(folder)
    stacks = [stack for stack in opened._stacks("auto", asked) if stack.path in EXPERTS]
    if not stored and asked == "float8_e4m3fn":  # parts of two rows, which may begin within a block
        stacks = [stack._replace(block=Blocks(4, 6)) for stack in stacks]
    for stack in stacks:
        rows, columns = stack.even_block
        first = rows if rows < stack.shape[-2] else 0
        cut = slice(first, first + rows), slice(0, columns)
        part = (slice(1, 2), slice(2, 5), *(slice(1, 2) for _ in stack.shape[2:-2]), *cut)
        both = [part, reading.whole_index(stack)]
        [[array, whole]] = reading.read(folder, [stack], [both], blocks_of(opened.config))
        np.testing.assert_array_equal(array.values.view(np.uint8), whole.values[part].view(np.uint8))
        np.testing.assert_array_equal(array.scale, whole.scale[stack.scale_part(part)])


LOADED = """
import sys, threading, time
import numpy as np, jax
import moe_jax
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
jax.device_put(np.zeros(1)).block_until_ready()
moe_jax.load(sys.argv[1], expert_dtype="auto")  # compiles, and starts threads
for folder, expert_dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    before, seen, done = anonymous(), [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.001)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    model = moe_jax.load(folder, expert_dtype=expert_dtype)
    done.set(), watch.join()
    experts = jax.tree.leaves(model.params["moe"]["experts"])
    print(max([*seen, anonymous()]) - before, sum(leaf.nbytes for leaf in experts))
    del model, experts
"""


def test_an_expert_weight_takes_one_byte_at_every_moment(tmp_path):
    """Stored in FP8 and kept, and quantised from bfloat16; with the other weights and the buffers of threads."""
    architecture = tiny_model.changed(moe={"expert_hidden": 512}, decoder={"d_model": 512})
    count = 2 * 16 * 3 * 512 * 512
    tiny_model.write_model(tmp_path / "small")
    tiny_model.write_model(tmp_path / "wide", architecture, dtype="bfloat16")
    conversion.convert(tmp_path / "wide", tmp_path / "narrow", expert_dtype="float8_e4m3fn")
    loads = (tmp_path / "narrow", "auto", tmp_path / "wide", "int8")
    command = [sys.executable, "-c", LOADED, tmp_path / "small", *loads]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        peak_bytes, loaded_bytes = map(int, line.split())
        assert count < loaded_bytes < 1.01 * count
        assert peak_bytes < 1.4 * count
    assert len(printed.splitlines()) == 2


def test_memory_is_checked_for_eight_bits(folder, monkeypatch):
    opened = checkpoint.open(folder)
    needed = sum(stack.bytes_of(reading.whole_index(stack)) for stack in opened._stacks("auto", "int8"))
    monkeypatch.setattr(memory, "host_bytes", lambda: needed)
    opened.read("auto", "int8")
    with pytest.raises(ValueError, match="of memory"):
        opened.read("auto", "model")
    monkeypatch.setattr(memory, "host_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match="of memory"):
        opened.read("auto", "int8")


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (128, 128)])
def test_what_is_saved_is_what_was_loaded(folder, tmp_path, rows, columns):
    quantize(folder, rows, columns)
    opened = checkpoint.open(folder)
    params = opened.read("auto", "auto")
    opened.save(tmp_path / "saved", params)
    table, before = (read_table(one / "model.safetensors") for one in (tmp_path / "saved", folder))
    for name in (DOWN, f"{DOWN}_scale_inv"):
        assert table[name][1:3] == before[name][1:3]  # dtype and shape
        np.testing.assert_array_equal(
            filling.read_values(table[name]).view(np.uint8), filling.read_values(before[name]).view(np.uint8)
        )
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert fields["weight_block_size"] == [rows, columns] and fields["quant_method"] == "fp8"
    others = fields["modules_to_not_convert"]
    assert "model.layers.2.self_attn.q_proj" in others and not any(".experts." in name for name in others)
    again = checkpoint.open(tmp_path / "saved").read("auto", "auto")
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.astype(np.float32), other.astype(np.float32))
    opened.save(tmp_path / "dense", params, dtype="float32")
    dense = flattened(checkpoint.open(tmp_path / "dense").read())
    np.testing.assert_array_equal(dense[EXPERTS[0]], wide(flattened(params)[EXPERTS[0]]).astype(np.float32))


def test_converting_keeps_eight_bits_unless_a_dtype_is_asked_for(folder, tmp_path):
    quantize(folder)
    kept = conversion.convert(folder, tmp_path / "kept", policy="topk:2")
    assert holds_any(kept.params) and checkpoint.open(tmp_path / "kept").eight_bits("auto")
    for name, settings in (
        ("a", {"dtype": "bfloat16"}),
        ("b", {"layout": "stacked"}),
        ("c", {"expert_dtype": "model"}),
    ):
        assert not holds_any(conversion.convert(folder, tmp_path / name, **settings).params)


def test_what_no_layout_holds_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="int8, for which the layout has no form: expected a dtype to save in"):
        conversion.convert(folder, tmp_path / "int8", expert_dtype="int8")
    for layout in ("stacked", "orbax"):
        with pytest.raises(ValueError, match="in eight bits, which only the layout of Hugging Face holds"):
            conversion.convert(folder, tmp_path / layout, layout=layout, expert_dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="expert_dtype = 'fp8': expected one of auto, model, float8_e4m3fn, int8"):
        moe_jax.load(folder, expert_dtype="fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_is_not_finite_is_refused(folder, monkeypatch):
    def with_nan(tensors):
        tensors[DOWN][-1, -1] = np.nan

    edit_tensors(folder, with_nan)
    with pytest.raises(ValueError, match=f"{DOWN} holds NaN or infinity"), np.errstate(invalid="ignore"):
        checkpoint.open(folder).read("auto", "int8")


@pytest.mark.parametrize("wrong", ["value", "scale"])
def test_stored_values_that_are_not_finite_are_refused(folder, monkeypatch, wrong):
    quantize(folder)
    monkeypatch.setattr(safetensors.numpy, "load_file", load_file)

    def damage(tensors):
        if wrong == "value":
            tensors[DOWN].view(np.uint8)[-1, -1] = 0xFF
        else:
            tensors[f"{DOWN}_scale_inv"][-1, -1] = np.inf

    edit_tensors(folder, damage)
    with pytest.raises(ValueError, match=f"{DOWN} holds NaN"):
        checkpoint.open(folder).read("auto", "auto")


def test_blocks_that_a_mesh_would_cut_are_refused_before_reading(folder):
    stacks = checkpoint.open(folder)._stacks("auto", "float8_e4m3fn")
    [stack] = [stack for stack in stacks if stack.path == EXPERTS[1]]
    stack = stack._replace(block=Blocks(16, 2), pieces=())  # 5 blocks along F
    mesh = jax.sharding.Mesh(np.array(jax.devices() * 2).reshape(1, 1, 2), ("data", "expert", "tensor"))
    spec = jax.sharding.PartitionSpec(None, "expert", None, "tensor")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    with pytest.raises(ValueError, match=r"down_LEDF has 5 blocks of 16 x 2 weights that share a scale: .* tensor"):
        reading.load_onto_devices(folder, [stack], None, lambda parameter: sharding)
