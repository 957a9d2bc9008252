"""Predicts throughput and latency of policies on a server that is not here, at every load.

    python launch/predict.py --config configs/predict_v2_lite.gin --out out/predict

A model of the server's steps is fitted to one column of a table of measured throughputs (predict.measured), and
predicts the other columns, beside which it is shown. With its constants the configured model is predicted under each
policy: in closed loops, and under open arrivals, which are simulated. What policies do with experts is counted by
running them on the routing of predict.routing. OUT/predicted.md has the tables, OUT/predicted.png the charts.
"""

import os
import pathlib

from moe_jax import command
from moe_jax.config import gin

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = 128  # whose routing is recorded
LENGTH = 256  # tokens of each; the second half is recorded


def main(run: command.Command) -> None:
    """Checks the configuration, fits, records routing, and predicts."""
    config, predict = run.config, run.config.predict

    import tqdm

    from moe_jax import checkpoint, files
    from moe_jax.report import predicted, predicted_chart
    from moe_jax.routing import policies
    from moe_jax.routing.policies.parse import MODEL_OWN, parse
    from moe_jax.study import expert_use, prediction

    opened = checkpoint.open(
        command.in_repository(predict.routing, "predict.routing"), calibration=None, setting="predict.routing"
    )
    expert_use.require_stand_in(opened.architecture, config.architecture)
    parsed = [parse(spec) for spec in predict.policies]
    compared = [MODEL_OWN, *(policy for policy in parsed if policy.parts != MODEL_OWN.parts)]
    policies.settings(compared, config.architecture, config.architecture.moe.num_experts)  # checks that they fit
    with run.timed("fit"):
        fits = fit_tables(config)
    recorded = record(run, opened)
    simulated = len(compared) * len(predict.loads) * len(predict.variations)
    constants = fits[0].constants
    with tqdm.tqdm(total=len(compared) + simulated, disable=None) as progress:
        with run.timed("routing"):
            progress.set_description("routing")
            models = prediction.load_models(
                compared, recorded, config.architecture, constants, predict, progress.update
            )
        with run.timed("simulation"):
            progress.set_description("simulation")
            latencies = prediction.latencies(models, predict, config.run.seed, progress.update)
    result = prediction.Predicted(
        subject_of(config),
        f"routing of {predict.routing} stands in for the model's own",
        constants,
        constants.reached(prediction.peak_of(predict)),
        prediction.saturating(config.architecture, predict),
        prediction.exchanged(config.architecture, predict),
        fits,
        prediction.gains(models, predict),
        latencies,
    )
    files.write_atomically(run.out / "predicted.png", predicted_chart.png(result))
    table = predicted.table(result)
    files.write_atomically(run.out / "predicted.md", table + "\n")
    run.finish(predicted.figures(result), rows=predicted.rows(result), text=table)


def fit_tables(config) -> list:
    """A fit for each measured table, of the configured model or of that of predict.measured_config."""
    from moe_jax.study import measured_table, prediction

    predict, architecture = config.predict, config.architecture
    if predict.measured_config:
        path = command.in_repository(predict.measured_config, "predict.measured_config")
        architecture = gin.read_config(path).architecture
    fits = []
    for name, column in zip(predict.measured, predict.columns):
        table = measured_table.read(command.in_repository(name, "predict.measured"))
        fits.append(prediction.fit_table(table, name, column, architecture, predict))
    return fits


def record(run: command.Command, opened):
    """The routing of predict.routing on held-out text, in a random order of documents."""
    import numpy as np

    from moe_jax.study import calibrate, expert_use
    from moe_jax.text.held_out import load_held_out
    from moe_jax.text.tokenizer import encode_documents

    config = run.config
    execution = run.execution_of(opened.architecture, opened.expected_dtype)
    with run.timed("text"):
        held_out = load_held_out(command.in_repository(config.text.held_out, "text.held_out"))
        documents = encode_documents(opened.require_tokenizer(), held_out)
        order = np.random.default_rng(config.run.seed).permutation(len(documents))
        shuffled = [documents[number] for number in order]
        length = min(LENGTH, opened.architecture.decoder.max_context)
        tokens_JT = calibrate.rows_of(shuffled, length, DOCUMENTS, "text.held_out")
    with run.timed("load"):
        params = opened.load("auto")
    with run.timed("record"):
        return expert_use.record(params, tokens_JT, length // 2, execution)


def subject_of(config) -> str:
    """The model, the machine and the load, in words."""
    predict, moe = config.predict, config.moe
    return (
        f"{config.decoder.num_moe_layers} layers of {moe.num_experts} experts, {moe.k} active, on {predict.devices} "
        f"devices of {1e-12 * predict.device_bytes_per_s:g} TB/s and {1e-12 * predict.device_flops_per_s:g} TFLOP/s; "
        f"requests of {predict.prompt_tokens} tokens that get {predict.output_tokens}"
    )


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "predict_v2_lite.gin"),
        default_out="out/predict",
    )
