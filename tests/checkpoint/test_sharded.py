"""Shards of parameters: each is read by itself, and devices get their own, in both layouts."""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import checkpoint, conversion
from moe_jax.checkpoint import huggingface, reading
from tests import tiny_model

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", dtype="bfloat16")


# path -> the part to read, and how to find the bytes around it by the names of tensors
PARTS = {
    "moe/experts/gate_up_LEIFD": np.s_[0:2, 4:8, 0:2, 8:16, 0:64],
    "moe/experts/down_LEDF": np.s_[1:2, 4:8, 0:64, 8:16],
    "moe/attention/query_LHAD": np.s_[0:2, 2:4, 0:16, 0:64],
    "moe/attention/output_LDHA": np.s_[0:2, 0:64, 2:4, 0:16],
    "embedding_VD": np.s_[128:256, 0:64],
    "norm_D": (slice(16, 32),),
}


def poisoned(name, tensor):
    """The tensor of that published name, with NaN outside `PARTS`."""
    kept = np.zeros(tensor.shape, bool)
    if ".mlp.experts." in name:
        layer, expert = int(name.split(".")[2]), int(name.split(".experts.")[1].split(".")[0])
        if 4 <= expert < 8 and "down_proj" not in name:
            kept[8:16] = True
        elif 4 <= expert < 8 and layer == 2:  # the second MoE layer, after a dense one
            kept[:, 8:16] = True
    elif ".q_proj." in name and not name.startswith("model.layers.0."):
        kept[32:64] = True  # heads of 16
    elif ".o_proj." in name and not name.startswith("model.layers.0."):
        kept[:, 32:64] = True
    elif "embed_tokens" in name:
        kept[128:256] = True
    elif name == "model.norm.weight":
        kept[16:32] = True
    return np.where(kept, tensor, np.array(np.nan, tensor.dtype))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_part_is_read_without_the_bytes_around_it(folder, tmp_path, dtype):
    expected = dict(huggingface.flattened(checkpoint.open(folder).read(dtype)))
    for path in folder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {name: poisoned(name, one) for name, one in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    opened = checkpoint.open(tmp_path)
    stacks = [stack for stack in opened._stacks(dtype) if stack.path in PARTS]
    arrays = reading.read(tmp_path, stacks, [[PARTS[stack.path]] for stack in stacks], None)
    assert len(stacks) == len(PARTS)
    for stack, [array] in zip(stacks, arrays):
        np.testing.assert_array_equal(array, expected[stack.path][PARTS[stack.path]])
        assert array.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    for stack in stacks:
        with pytest.raises(ValueError, match="holds NaN"):
            reading.read(tmp_path, [stack], [[reading.whole_index(stack)]], None)


ON_EIGHT = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from moe_jax import checkpoint
from moe_jax.checkpoint import filling, huggingface

jax.config.update("jax_num_cpu_devices", 8)
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))
axes = {"E": "expert", "F": "data", "V": "data", "G": "data"}

def sharding_of(parameter):
    if parameter.letters == "D":
        return None
    return NamedSharding(mesh, PartitionSpec(*(axes.get(letter) for letter in parameter.letters)))

filled = []
fill = filling.fill
filling.fill = lambda sources: [filled.extend(sources), fill(sources)][1]
read_bytes = {}
for folder in sys.argv[1:]:
    opened = checkpoint.open(folder)
    whole = dict(huggingface.flattened(opened.read()))
    filled.clear()
    loaded = dict(huggingface.flattened(opened.load("auto", sharding_of)))
    assert loaded.keys() == whole.keys()
    for path, array in loaded.items():
        np.testing.assert_array_equal(np.asarray(array), whole[path])
        assert len(array.addressable_shards) == (1 if path == "norm_D" else 8)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[path][shard.index])
    experts = loaded["moe/experts/down_LEDF"]
    assert experts.addressable_shards[0].data.shape == (2, 4, 64, 12)
    read_bytes[folder] = [sum(one.destination.nbytes for one in filled), sum(one.nbytes for one in whole.values())]
print(json.dumps(read_bytes))
"""


def test_each_of_eight_devices_holds_its_own(folder):
    conversion.convert(folder, folder.with_name("stacked"), layout="stacked")
    folders = [str(folder), str(folder.with_name("stacked"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command_line = [sys.executable, "-W", "error", "-c", ON_EIGHT, *folders]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read_bytes = json.loads(done.stdout)
    copied, whole = read_bytes[folders[0]]
    assert copied == whole  # every value once, however many devices hold it
    assert read_bytes[folders[1]][0] == 0  # mapped
