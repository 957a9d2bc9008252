"""Trains a fine-grained MoE from scratch, measures it on the held-out text, and exports it.

    python launch/train.py --config configs/train_demo.gin --out out/demo

Started again with the same --out, it goes on where it was killed. The model is exported to OUT/model.
"""

import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Prepares the text, trains, exports and measures."""
    import jax

    from moe_jax.report import trained
    from moe_jax.training import loop

    execution = loop.execution_of(run.config, jax.default_backend())
    run.implementations["grouped_matmul"] = execution.grouped_matmul
    trained.require_policies(run.config, execution)
    with run.timed("text"):
        text = loop.prepare_text(run.config, run.out)
    with run.timed("run"):
        params = loop.train(run.config, run.out, text, execution)
    with run.timed("measure"):
        finished = trained.finish(run.config, run.out, text, execution, params)
    figures, rows = trained.figures(finished)
    run.finish(figures, rows=rows, text=trained.table(finished))


if __name__ == "__main__":
    command.run(main, default_config=ROOT / "configs/train_demo.gin", default_out="out/train", huge_pages=True)
