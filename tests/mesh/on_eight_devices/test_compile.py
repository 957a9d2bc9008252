"""launch/compile.py for eight virtual devices: what it reports is what arrays take, and what it chooses fits."""

import json

import jax
import pytest

from moe_jax.config import gin
from moe_jax.cost import parallel
from moe_jax.model import parameters
from moe_jax.study import topologies, whole_steps
from moe_jax.study.compile import CompileTask
from tests import launcher_module

SMALL = {
    **{"decoder.vocab_size": 512, "decoder.d_model": 64, "decoder.num_layers": 2, "decoder.dense_hidden": 96},
    **{"attention.head_dim": 16, "moe.num_experts": 16, "moe.expert_hidden": 24},
    **{"compile.topology": "cpu:8", "compile.positions": 32, "compile.prompt": 16, "compile.batches": "(2, 16)"},
}


def test_a_decode_step_on_the_best_mesh(tmp_path):
    printed = launcher_module.run_main("compile", SMALL, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    figures = {name: one["value"] for name, one in result["figures"].items()}
    assert printed.startswith("decode of 8 rows of 32 positions") and "\nfits: " in printed
    parts = sum(figures[f"{name}_bytes"] for name in ("weight", "cache", "temporary", "other"))
    assert figures["needed_bytes"] == parts <= figures["memory_bytes"] and figures["fits"] == 1
    assert figures["held_bytes"] == figures["weight_bytes"] + figures["cache_bytes"]
    table = {(row["policy"], row["rows"]): row["figures"] for row in result["rows"]}
    assert set(table) == {(f"topk:{k}", rows) for k in (8, 6, 4, 2) for rows in (2, 8, 16)}
    for rows in (2, 8, 16):
        read = [table[f"topk:{k}", rows]["bytes"]["value"] for k in (8, 6, 4, 2)]
        assert read == sorted(read, reverse=True) and read[0] > read[-1]
    assert table["topk:8", 8]["bytes"] == result["figures"]["bytes"]


def test_the_bytes_of_weights_are_those_of_arrays():
    overrides = [f"{name}={value}" for name, value in SMALL.items()]
    task = CompileTask(gin.read_config(None, overrides), topologies.find("cpu:8"))
    shapes = parameters.shapes(task.config.architecture, "bfloat16")

    def make():
        return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)

    sizes = set()
    for candidate in task.meshes():
        layout = task.executed(candidate.mesh).layout
        made = jax.jit(make, out_shardings=jax.tree_util.tree_map_with_path(layout.of_leaf, shapes))()
        held = [sum(leaf.addressable_shards[device].data.nbytes for leaf in jax.tree.leaves(made)) for device in (0, 7)]
        counted = parallel.weight_bytes(task.config.architecture, candidate.execution.layout, 2)
        assert held == [counted] * 2
        sizes.add(counted)
        if len(sizes) == 3:
            break


def test_a_mesh_that_is_given_is_taken(tmp_path):
    given = {"mesh.expert": 4, "mesh.data": 2, "compile.phase": "prefill"}
    printed = launcher_module.run_main("compile", SMALL | given, tmp_path)
    assert printed.startswith("prefill of 8 rows of 16 tokens")
    assert "mesh data 2 x expert 4 x tensor 1, experts over expert" in printed
    assert "meshes, by count" not in printed


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"mesh.data": 4}, r"mesh.data x expert x tensor = 4 x 1 x 1 = 4 devices: expected the 8 of compile.topology"),
        ({"mesh.data": 8, "compile.rows": 12}, "compile.rows = 12: expected a multiple of mesh.data = 8"),
        ({"mesh.expert": 2, "mesh.tensor": 4, "attention.num_heads": 6}, "mesh.tensor = 4: expected a divisor"),
        ({"compile.rows": 7, "moe.num_experts": 9}, "no mesh of 8 devices divides the model and compile.rows = 7"),
        ({"compile.k": "(9,)"}, r"compile.k = \(9,\): expected at most the model's own 8 experts"),
        (
            {"compile.phase": "finetune", "finetune.teacher": "elsewhere"},
            r"finetune.teacher = 'elsewhere': expected '', since the model itself is counted",
        ),
        (
            {"model.expert_dtype": "int8"},
            "model.expert_dtype = 'int8': expected auto or model, since steps are compiled",
        ),
        ({"compile.positions": 4096}, "compile.positions = 4096: expected at most the model's 1024"),
        ({"compile.phase": "prefill", "compile.prompt": 64}, "compile.prompt = 64: expected at most compile.positions"),
    ],
)
def test_what_cannot_be_is_refused(changed, refusal, tmp_path):
    with pytest.raises(ValueError, match=refusal) as error:
        launcher_module.run_main("compile", SMALL | changed, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_state_of_a_finetuning_step_by_hand():
    """Weights and a teacher in bfloat16, a router and norms in float32, two moments of each; lowered, not compiled."""
    settings = {"compile.phase": "finetune", "training.weights": "bfloat16", "training.sequence_length": 16}
    settings |= {"mesh.data": 8, "mesh.fsdp": 8, "policy.spec": "topk:2", "objective.distillation": 1.0}
    overrides = [f"{name}={value}" for name, value in (SMALL | settings).items()]
    task = CompileTask(gin.read_config(None, overrides), topologies.find("cpu:8"))
    (candidate,) = task.meshes()
    step = task.lower(candidate)
    architecture, layout = task.config.architecture, candidate.execution.layout
    sizes = {one.path: parallel.shard_size(one, architecture, layout) for one in parameters.of(architecture)}
    router = sum(size for path, size in sizes.items() if "router" in path)
    norms = sum(size for path, size in sizes.items() if path.split("/")[-1].split("_")[-2] == "norm")
    bias, total = sizes["moe/router/bias_LE"], sum(sizes.values())
    assert whole_steps.device_bytes(step.weights) == 2 * 2 * total + 2 * (router - bias + norms)
    assert whole_steps.device_bytes(step.cache) == 2 * 4 * (total - bias) + 2 * 4  # and two counters
