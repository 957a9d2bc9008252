"""Trains a fine-grained MoE from scratch, exports it, and measures it on held-out text.

    python launch/train.py --config configs/train_demo.gin --out out/demo

A killed run resumes when it is started again with the same --out. The model is exported to OUT/model.
"""

import dataclasses
import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Prepares the text, trains, exports and measures."""
    from moe_jax.report import trained
    from moe_jax.study import pretrain
    from moe_jax.study.compare import compared_policies
    from moe_jax.training import loop, pretraining

    config = run.config
    execution = run.execution_of(config.architecture, config.training.weights, training=True)
    compared_policies(config.evaluation, config.architecture, execution.k_max)  # checked before hours of training
    pretraining.require_possible(config)
    loop.require_same_run(config, run.out)
    with run.timed("text"):
        held_out = str(command.in_repository(config.text.held_out, "text.held_out"))
        resolved = dataclasses.replace(config, text=dataclasses.replace(config.text, held_out=held_out))
        text = pretraining.prepare_text(resolved, run.out)
    with run.timed("run"):
        params = pretraining.train(config, run.out, text, execution)
    with run.timed("measure"):
        exported = pretrain.export(config, run.out, text, execution, params)
    rows = trained.rows(exported)
    trained.write(config, run.out, exported, rows)
    run.finish(trained.figures(config, exported, rows), rows=rows, text=trained.table(rows))


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "train_demo.gin"),
        default_out="out/train",
        huge_pages=True,
        on_mesh=True,
    )
