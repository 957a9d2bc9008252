"""Counts what a token sends in one MoE layer over eight devices, by dispatch and experts per token.

    python benchmarks/dispatch.py --config configs/benchmark_dispatch.gin --out out/dispatch

Read from compiled programs; for `ragged`, whose sends are data, counted in a run. In rows of D numbers per token, over
all devices, forward: what has to leave a device. Tokens choose their experts uniformly at random.
"""

import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
DEVICES, TOKENS = 8, 512
SLOTS = (8, 6, 4, 2)


def main(run: command.Command) -> None:
    """Compiles one layer for every dispatch and number of slots."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding

    from moe_jax.cost.collectives import collectives
    from moe_jax.dispatch.api import dispatch
    from moe_jax.dispatch.contract import Dispatch, Experts
    from moe_jax.routing.selection import Selection

    mesh = jax.make_mesh((1, DEVICES, 1), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    moe, d_model = run.config.moe, run.config.decoder.d_model
    random = np.random.default_rng(run.config.run.seed)
    x_ND = random.standard_normal((TOKENS, d_model)).astype(np.float32)
    expert_NK = random.permuted(np.tile(np.arange(moe.num_experts, dtype=np.int32), (TOKENS, 1)), axis=1)
    experts = Experts(
        random.standard_normal((1, moe.num_experts, 2, moe.expert_hidden, d_model)).astype(np.float32),
        random.standard_normal((1, moe.num_experts, d_model, moe.expert_hidden)).astype(np.float32),
        np.int32(0),
    )
    names = ("replicated", "all_gather", "all_to_all", "ragged", "tensor")
    figures, lines = {}, [" k " + " ".join(f"{name:>11}" for name in names)]
    for k in SLOTS:
        ones = np.ones((TOKENS, k), np.float32)
        selection = Selection(expert_NK[:, :k], ones / k, ones > 0)
        sent = {}
        for name in names[:-1]:
            how = Dispatch(name, mesh, capacity=1.25, drop=name == "all_to_all")
            placed = jax.tree.map(lambda part, spec: NamedSharding(mesh, spec), experts, how.experts_specs)
            layer = jax.jit(lambda *operands, how=how: dispatch(*operands, "blocked", how))
            program = layer.lower(x_ND, selection, jax.device_put(experts, placed)).compile()
            if name == "ragged":
                sent[name] = 2 * int(program(x_ND, selection, jax.device_put(experts, placed))[1].sent) / TOKENS
            else:
                found = collectives(program.as_text())
                sent[name] = DEVICES * sum(one.sent_bytes for one in found) / (x_ND.nbytes)
        sent["tensor"] = 2.0 * (DEVICES - 1)
        lines.append(f"{k:2} " + " ".join(f"{rows:11.2f}" for rows in sent.values()))
        figures |= {f"{name}_{k}": {"value": rows, "unit": "rows per token"} for name, rows in sent.items()}
    run.finish(figures, text="\n".join(lines))


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "benchmark_dispatch.gin"),
        default_out="out/dispatch",
    )
