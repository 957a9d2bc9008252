"""Fine-tunes the demo in many ways: how much of the cost of fewer experts each recovers, by k and number of tokens.

    python benchmarks/recovery.py --config configs/finetune_demo.gin --out out/recovery
    python benchmarks/recovery.py --out out/recovery --runs table --runs long

Each run does what launch/finetune.py does with the settings named here, in its own folder in --out. The text and the
measurements of the original model are made once and kept in OUT. Several processes may share the runs. Started again
after a kill, it continues; finished runs are not repeated. OUT/table.md summarises all finished runs of the folder.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import pickle

from absl import flags

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = 2048  # per step, as configured
FEW, MANY = ("model", "topk:4", "topk:2"), ("model", "topk:6", "topk:4", "topk:3", "topk:2")  # policies to evaluate
RATE, SPEC, POLICIES = "training.learning_rate", "policy.spec", "evaluation.policies"
BEST_CONTROL_RATE = 2e-4  # the best learning rate in "control_rates"
SEEDS = (0, 1, 2)


def _mix(language_model: float, hidden: float = 0.0) -> dict[str, float]:
    """`language_model` is the weight of the next-token loss; distillation from the full model gets the rest."""
    return {
        "objective.language_model": language_model,
        "objective.distillation": 1 - language_model,
        "objective.hidden": hidden,
    }


DISTILLED, MIXED, BOTH, PLAIN = _mix(0.0), _mix(0.25), _mix(0.5), _mix(1.0)


def _steps(millions: float, tokens: int = TOKENS) -> dict[str, int]:
    steps = round(millions * 1e6 / tokens)
    return {"training.steps": steps, "training.evaluate_every": -(-steps // 5)}


def _batch(rows: int, millions: float) -> dict[str, int]:
    """Smaller batches, and more steps."""
    return {"training.batch_size": rows, "training.accumulation": 1} | _steps(millions, rows * 512)


def _plain(rate: float, millions: float, seed: int = 0) -> dict:
    """The control: the same steps of plain training with all experts."""
    return {SPEC: "model", RATE: rate, "run.seed": seed, POLICIES: MANY} | PLAIN | _steps(millions)


def _at(k: int, millions: float, seed: int = 0) -> dict:
    """The configured objective and learning rate."""
    return {SPEC: f"topk:{k}", "run.seed": seed, POLICIES: MANY} | _steps(millions)


WIDE = {"training.batch_size": 8, "training.accumulation": 2}
SHORT = {SPEC: "topk:4", POLICIES: FEW, RATE: 6e-4} | DISTILLED | WIDE | _steps(0.5, 8192)
LONG = _at(4, 2.0)
ELASTIC = _at(8, 2.0) | {"finetune.elastic": True, "finetune.k_min": 2}
GROUPS = {
    # objective, trained parameters, learning rate and batch size: k = 4, half a million tokens each
    "table": {
        "distilled_6e-4": SHORT,
        "plain_6e-4": SHORT | PLAIN,
        "both_6e-4": SHORT | BOTH,
        "distilled_1.2e-3": SHORT | {RATE: 1.2e-3},
        "half_batch_6e-4": SHORT | _batch(8, 0.5),
        "quarter_batch_4e-4": SHORT | _batch(4, 0.5) | {RATE: 4e-4},
        "quarter_batch_mixed_4e-4": SHORT | MIXED | _batch(4, 0.5) | {RATE: 4e-4},
        "distilled_3e-4": SHORT | {RATE: 3e-4},
        "lora_3e-3": SHORT | {RATE: 3e-3, "finetune.train": "lora"},
        "router_and_norms_3e-3": SHORT | {RATE: 3e-3, "finetune.train": "router_and_norms"},
        "router_3e-3": SHORT | {RATE: 3e-3, "finetune.train": "router"},
        "reverse_6e-4": SHORT | {"objective.direction": "reverse"},
        "rollouts_6e-4": SHORT | {"finetune.rollouts": 976},
        "hidden_6e-4": SHORT | {"objective.hidden": 0.5},
    },
    # the same at two million tokens; k4_seed0 belongs to this table too
    "long_table": {
        "k4_distilled_2e-4": LONG | DISTILLED | {RATE: 2e-4},
        "k4_distilled_4e-4": LONG | DISTILLED,
        "k4_distilled_rows_2_4e-4": LONG | DISTILLED | _batch(2, 2.0),
        "k4_distilled_rows_8_8e-4": LONG | DISTILLED | _batch(8, 2.0) | {RATE: 8e-4},
        "k4_both_4e-4": LONG | BOTH,
    },
    # the control's learning rate is tuned like the others'
    "control_rates": {f"control_{rate:g}": _plain(rate, 2.0) for rate in (1e-4, 2e-4, 4e-4)},
    # the control of quarter_batch_mixed_4e-4
    "short_control": {"control_0.5M": _plain(BEST_CONTROL_RATE, 0.5)},
    # two million tokens each
    "long": {"k4_seed0": LONG, "k2": _at(2, 2.0)},
    "elastic": {
        "elastic": ELASTIC,
        "elastic_rows": ELASTIC | {"finetune.k_drawn_per": "row", "finetune.k_weights": (1, 1, 1, 1, 2, 2, 2)},
        "elastic_rows_6": ELASTIC | {"finetune.k_drawn_per": "row", "finetune.k_weights": (2, 1, 1, 1, 6, 1, 2)},
        "elastic_rows_middle": ELASTIC
        | {"finetune.k_drawn_per": "row", "finetune.k_weights": (8, 8, 9, 9, 22, 22, 22)},
        "elastic_rows_high": ELASTIC | {"finetune.k_drawn_per": "row", "finetune.k_weights": (3, 3, 4, 4, 12, 12, 12)},
    },
    "seeds": {
        name: settings
        for seed in SEEDS[1:]
        for name, settings in {
            f"k4_seed{seed}": _at(4, 2.0, seed),
            f"control_seed{seed}": _plain(BEST_CONTROL_RATE, 2.0, seed),
        }.items()
    },
    # compared with the elastic checkpoint
    "specialists": {"k3": _at(3, 2.0), "k6": _at(6, 2.0)},
    "longer": {"k4_4M": _at(4, 4.0), "control_4M": _plain(BEST_CONTROL_RATE, 4.0)},
}
CONTROLS = (f"control_{BEST_CONTROL_RATE:g}", *(f"control_seed{seed}" for seed in SEEDS[1:]))
RUNS = flags.DEFINE_multi_string("runs", [], f"Group or name of runs: {', '.join(GROUPS)}; repeatable; default: all.")

JUDGE = flags.DEFINE_bool("judge", False, "Also measure choices and completions of the long runs.")


def main(run: command.Command) -> None:
    """Runs what is not finished, one after the other, then summarises all finished runs."""
    from moe_jax import checkpoint, files
    from moe_jax.config import gin
    from moe_jax.engine.request import execution_of
    from moe_jax.report import finetuned
    from moe_jax.study import recover
    from moe_jax.text.held_out import load_held_out
    from moe_jax.training import trainable

    base = run.config
    named = {name: settings for group in GROUPS.values() for name, settings in group.items()}
    chosen = [name for asked in RUNS.value or GROUPS for name in GROUPS.get(asked, [asked])]
    if unknown := [name for name in chosen if name not in named]:
        raise ValueError(f"--runs = {unknown[0]!r}: expected any of {', '.join([*GROUPS, *named])}")
    opened = checkpoint.open(command.in_repository(base.model.path), calibration=None)
    architecture = opened.architecture
    execution = execution_of(architecture)
    configs = {}
    for name in chosen:
        overrides = [*flags.FLAGS["set"].value, *(f"{setting}={value!r}" for setting, value in named[name].items())]
        configs[name] = gin.read_config(flags.FLAGS["config"].value, overrides)
        recover.recovery_policies(configs[name], architecture)
    held_out = str(command.in_repository(base.text.held_out, "text.held_out"))
    with run.timed("text"):
        text = _prepared(base, run.out, opened, held_out)
    params = opened.load(base.training.weights)
    compared = list(
        dict.fromkeys(
            policy for config in configs.values() for policy in recover.recovery_policies(config, architecture).compared
        )
    )
    with run.timed("before"):
        before = _before(
            run.out / f"before-{_key(text.digest, trainable.digest(params), base.evaluation.documents)}.pickle",
            compared,
            lambda missing: recover.measure(base, params, text, missing, execution, "before"),
        )
    for name, config in configs.items():
        folder = run.out / name
        if (folder / "result.json").exists():
            if (folder / "config.gin").read_text() != gin.to_gin(config):
                raise ValueError(f"{folder} holds a run with other settings: expected another --out")
            continue
        folder.mkdir(exist_ok=True)
        run_policies = recover.recovery_policies(config, architecture)
        with run.timed(name):
            known = [before[policy] for policy in run_policies.compared]
            finished = recover.recover(config, folder, opened, params, text, run_policies, execution, known)
        rows = finetuned.rows(finished)
        finetuned.write(config, folder, finished, rows)
        figures = {"figures": finetuned.figures(finished, rows), "rows": rows, "seconds": run.seconds[name]}
        result = figures | command.provenance() | {"date": datetime.date.today().isoformat()}
        files.write_atomically(folder / "config.gin", gin.to_gin(config))
        files.write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
        print(f"{name}: {run.seconds[name]:.0f} s\n{finetuned.table(rows)}\n", flush=True)
    text, figures = summary(run.out, named)
    if JUDGE.value:
        with run.timed("judge"):
            text += "\n\n" + _judged(base, run.out, opened.folder, load_held_out(held_out))
    files.write_atomically(run.out / "table.md", text + "\n")
    run.finish(figures, text=text)


def _key(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _prepared(config, out: pathlib.Path, model, held_out: str):
    """Prepares the text, or reads it from the file of an earlier start."""
    settings = config.text, config.training.sequence_length, config.evaluation.documents
    kept = out / f"text-{_key(settings, model.files['tokenizer.json'])}.pickle"
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    from moe_jax import files
    from moe_jax.training import finetuning

    config = dataclasses.replace(config, text=dataclasses.replace(config.text, held_out=held_out))
    text = finetuning.prepare_text(config, model)
    files.write_atomically(kept, pickle.dumps(text))
    return text


def _before(kept: pathlib.Path, compared, measure) -> dict:
    """Measurements of the original model by policy, reusing those of earlier starts."""
    from moe_jax import files

    before = pickle.loads(kept.read_bytes()) if kept.exists() else {}
    if missing := [policy for policy in compared if policy not in before]:
        before |= zip(missing, measure(missing))
        files.write_atomically(kept, pickle.dumps(before))
    return before


def _judged(config, out: pathlib.Path, original: pathlib.Path, documents) -> str:
    """Choices and completions on the reported half, of the original and the finished runs."""
    import recovery_judged

    half = dataclasses.replace(config.evaluation, half="odd", completion_headers=104)
    config = dataclasses.replace(config, evaluation=half)
    models = {"original, all experts": (original, "model")}
    for k, runs in ((4, (CONTROLS[0], "k4_seed0")), (2, (CONTROLS[0], "k2"))):
        models[f"original, {k}"] = original, f"topk:{k}"
        models |= {
            f"{name}, {k}": (out / name / "model", f"topk:{k}") for name in runs if (out / name / "model").exists()
        }
    judged = {name: recovery_judged.judge(config, out, *model, documents) for name, model in models.items()}
    return recovery_judged.table(judged, next(iter(judged)))


def summary(folder: pathlib.Path, names) -> tuple[str, dict]:
    """The tables of all finished runs, and their figures."""
    import recovery_tables as tables

    from moe_jax.report.figures import figure

    runs = tables.read_runs(folder, list(names))

    def finished(*expected):
        return [runs[name] for name in expected if name in runs]

    parts = [tables.short_runs(runs, GROUPS["table"]), tables.short_runs(runs, [*GROUPS["long_table"], "k4_seed0"])]
    parts += [tables.control_rates(runs, GROUPS["control_rates"])]
    figures = {}
    seeds, controls = finished(*(f"k4_seed{seed}" for seed in SEEDS)), finished(*CONTROLS)
    one_seed = {f"topk:{k}": finished(f"k{k}") for k in (2, 3, 6)}
    by_k = {"topk:4": tables.Comparison("topk:4", seeds, controls)}
    by_k |= {policy: tables.Comparison(policy, tuned, finished(CONTROLS[0])) for policy, tuned in one_seed.items()}
    by_tokens = {
        "0.5 M": tables.Comparison("topk:4", finished("quarter_batch_mixed_4e-4"), finished("control_0.5M")),
        "2 M": by_k["topk:4"],
        "4 M": tables.Comparison("topk:4", finished("k4_4M"), finished("control_4M")),
    }
    for label, comparisons in (("after 2 M tokens", by_k), ("`topk:4` after", by_tokens)):
        table, found = tables.against_control(comparisons, label)
        parts.append(table)
        for name, share in found.items():
            figures[f"recovered_{name.replace(' ', '')}"] = figure(share, "1")
    long = {"topk:4": seeds} | one_seed
    specialists = {policy: tuned[0] for policy, tuned in sorted(long.items()) if tuned}
    for name in GROUPS["elastic"] if specialists else ():
        for one in finished(name):
            table, found = tables.elastic(one, name, specialists)
            parts.append(table)
            figures |= {
                f"{name}_over_specialist_{policy}": {"value": share, "unit": "1"} for policy, share in found.items()
            }
    return "\n\n".join(part for part in parts if part.count("\n") > 1), figures


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "finetune_demo.gin"),
        default_out="out/recovery",
        huge_pages=True,
    )
