"""Trains a fine-grained MoE from scratch, measures it on the held-out text, and exports it.

    python launch/train.py --config configs/train_demo.gin --out out/demo

Started again with the same --out, it goes on where it was killed. The model is exported to OUT/model.
"""

from moe_jax import command


def main(run: command.Command) -> None:
    import jax

    from moe_jax.training import loop

    execution = loop.execution_of(run.config, jax.default_backend())
    run.implementations["grouped_matmul"] = execution.grouped_matmul
    with run.timed("text"):
        text = loop.prepare_text(run.config, run.out)
    with run.timed("run"):
        loop.train(run.config, run.out, text, execution)


if __name__ == "__main__":
    command.run(main, default_config="configs/train_demo.gin", default_out="out/train")
