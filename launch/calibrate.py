"""Measures what the policies `median` and `reroute` need to know about a model; writes OUT/calibration.npz.

    python launch/calibrate.py --config configs/calibrate_demo.gin --out out/calibrate

The text is that of text.sources, not the held-out text on which policies are compared. Put the file into the model's
folder, or name it in policy.calibration.
"""

import dataclasses
import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
LENGTH = 256  # tokens of each document
DOCUMENTS = 64


def main(run: command.Command) -> None:
    """Reads text and model, measures, and prints the result."""
    config = run.config

    import numpy as np

    from moe_jax.routing import calibration as calibrations
    from moe_jax.study import calibrate
    from moe_jax.text import corpus
    from moe_jax.text.held_out import load_held_out
    from moe_jax.text.tokenizer import encode_documents

    opened, execution = run.open_model(calibrated=False)
    architecture = opened.architecture
    execution = dataclasses.replace(execution, k_max=architecture.moe.k)
    with run.timed("text"):
        held_out = load_held_out(command.in_repository(config.text.held_out, "text.held_out"))
        collected = corpus.collect(config.text.sources, held_out)
        documents = encode_documents(opened.require_tokenizer(), collected.documents)
        rows_JT = calibrate.rows_of(documents, min(LENGTH, architecture.decoder.max_context), DOCUMENTS, "text.sources")
    model = run.load(opened)
    with run.timed("run"):
        calibration = calibrate.measure(model.params, rows_JT, execution)
    calibrations.save(run.out / calibrations.NAME, calibration)
    others_LEE = np.where(np.eye(architecture.moe.num_experts, dtype=bool), -1, calibration.similarity_LEE)
    nearest_L = np.median(others_LEE.max(axis=2), axis=1)
    figures = {"tokens": {"value": rows_JT.size, "unit": "tokens"}}
    for layer, (ratio, nearest) in enumerate(zip(calibration.median_ratio_L.tolist(), nearest_L.tolist())):
        figures[f"median_ratio_layer_{layer}"] = {"value": ratio, "unit": "1"}
        figures[f"nearest_expert_layer_{layer}"] = {"value": nearest, "unit": "1"}
    lines = [f"on {rows_JT.size} tokens, for each MoE layer: median w_i / w_1, median similarity to the nearest expert"]
    lines += [
        f"{layer:3} {ratio:.3f} {nearest:.3f}"
        for layer, (ratio, nearest) in enumerate(zip(calibration.median_ratio_L, nearest_L))
    ]
    run.finish(figures, text="\n".join([*lines, str(run.out / calibrations.NAME)]))


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "calibrate_demo.gin"),
        default_out="out/calibrate",
    )
