"""Converts a checkpoint to another dtype, another number of active experts, or another layout, into OUT/model.

    python launch/convert.py --set model.path=assets/demo --set policy.spec=topk:4 --out out/four

model.path is a Hugging Face folder, the folder of a training run, or Orbax parameters that were written here. Servers
that know nothing of policies then run the number of experts that the checkpoint says.
"""

from absl import flags

from moe_jax import command

TO = flags.DEFINE_enum("to", "huggingface", ["huggingface", "orbax"], "The layout that is written.")


def main(run: command.Command) -> None:
    """Converts, and says what was written."""
    path = command.in_repository(run.config.model.path)

    import jax

    from moe_jax import conversion

    settings = {"layout": TO.value, "dtype": run.config.model.dtype, "policy": run.config.policy.spec}
    with run.timed("run"):
        held = conversion.convert(path, run.out / "model", **settings)
    parameters = sum(array.size for array in jax.tree.leaves(held.params))
    figures = {
        "parameters": {"value": parameters, "unit": "1"},
        "experts_per_token": {"value": held.architecture.moe.k, "unit": "experts"},
    }
    run.finish(
        figures,
        text=f"{parameters / 1e6:,.1f} M parameters, {held.architecture.moe.k} of "
        f"{held.architecture.moe.num_experts} experts active: {run.out / 'model'}",
    )


if __name__ == "__main__":
    command.run(main, default_out="out/convert")
