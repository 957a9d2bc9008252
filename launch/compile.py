"""Compiles a step of a model for devices that are not here, and says whether it fits and how long it takes at least.

    python launch/compile.py --config configs/models/qwen3_30b_a3b.gin --set compile.topology=v5e:2x4 --out out/compile

The real compilers run, with our kernels, on abstract arrays: nothing of the model's size is in memory. TPUs need
`requirements-aot.txt`, GPUs `requirements-aot-gpu.txt`, each in an environment of its own. Of the meshes that divide
the model the one with the least time by count is compiled; with mesh.data, mesh.expert or mesh.tensor it is that one.

The exit status is 0 if the step fits in the memory of the devices, and 3 if it does not.
"""

import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
TOO_LARGE = 3  # exit status


def main(run: command.Command) -> int:
    """Finds the devices, chooses a mesh, compiles, and reports."""
    from moe_jax.report import compiled as report
    from moe_jax.study import topologies
    from moe_jax.study.compile import CompileResult, CompileTask

    topology = topologies.find(run.config.compile.topology)
    task = CompileTask(run.config, topology)
    with run.timed("meshes"):
        candidates = task.meshes()
    run.implementations |= candidates[0].execution.implementations
    with run.timed("compile"):
        result = CompileResult(task, candidates, task.compile(candidates[0]))
    run.finish(report.figures(result), rows=report.rows(result), text=report.table(result))
    return 0 if result.fits else TOO_LARGE


def virtual_devices(config) -> int:
    """The devices to make on the CPU: those of the topology, or one, for what is not compiled."""
    from moe_jax.study import topologies

    kind, sides = topologies.parse(config.compile.topology)
    return sides[0] if kind == "cpu" else 1


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "compile_demo.gin"),
        default_out="out/compile",
        elsewhere=True,
        virtual_devices=virtual_devices,
    )
