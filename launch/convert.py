"""Converts a checkpoint to another dtype, another number of active experts, or another layout, into OUT/model.

    python launch/convert.py --set model.path=DIR --to stacked --out out/fast

model.path is a Hugging Face folder, the name of a model on a hub, the folder of a training run, or an earlier output.
Servers without policies then run the converted checkpoint's number of experts. With --to stacked the weights are
written as they lie in memory: every launcher opens such a folder at once, since it is mapped and not read.
"""

from absl import flags

from moe_jax import command

TO = flags.DEFINE_enum("to", "huggingface", ["huggingface", "stacked", "orbax"], "The layout to write.")


def main(run: command.Command) -> None:
    """Converts, and prints what was written."""
    path = command.in_repository(run.config.model.path)

    from moe_jax import conversion
    from moe_jax.model import parameters

    settings = {"layout": TO.value, "dtype": run.config.model.dtype, "policy": run.config.policy.spec}
    settings["expert_dtype"] = run.config.model.expert_dtype
    with run.timed("run"):
        held = conversion.convert(path, run.out / "model", **settings)
    architecture = held.checkpoint.architecture
    size, moe = parameters.count(architecture), architecture.moe
    figures = {
        "parameters": {"value": size, "unit": "1"},
        "experts_per_token": {"value": moe.k, "unit": "experts"},
    }
    run.finish(
        figures,
        text=f"{size / 1e6:,.1f} M parameters, {moe.k} of {moe.num_experts} experts active: {run.out / 'model'}",
    )


if __name__ == "__main__":
    command.run(main, default_out="out/convert")
