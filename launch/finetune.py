"""Fine-tunes a model under the policy that it will be served with, to recover the quality that fewer experts cost.

    python launch/finetune.py --config configs/finetune_demo.gin --set policy.spec=topk:4 --out out/four

A killed run resumes when it is started again with the same --out. The model is exported to OUT/model, in the layout
that was read, with the policy's k as its own. The table compares quality before and after, on held-out files that were
not used to choose the best step. With finetune.elastic=True one model learns every k. A pruned model is taught by the
whole one with finetune.teacher, see docs/pruning.md.
"""

import dataclasses
import os
import pathlib

from moe_jax import command

ROOT = pathlib.Path(__file__).parents[1]


def main(run: command.Command) -> None:
    """Checks the configuration, then measures, trains, exports and measures again."""
    from moe_jax.evaluation.journal import Journal, identity
    from moe_jax.model.sharding import sharding_of
    from moe_jax.report import finetuned
    from moe_jax.routing.policies.parse import MODEL_OWN
    from moe_jax.study import recover
    from moe_jax.training import finetuning, loop

    config = run.config
    held_out = config.text.held_out and str(command.in_repository(config.text.held_out, "text.held_out"))
    resolved = dataclasses.replace(config, text=dataclasses.replace(config.text, held_out=held_out))
    opened, execution = run.open_model(dtype=config.training.weights, training=True)
    execution = dataclasses.replace(execution, k_max=max(execution.k_max, opened.architecture.moe.k))
    teacher, teacher_execution = open_teacher(run, opened)
    run_policies = recover.recovery_policies(config, opened.architecture, opened.calibration)
    loop.require_same_run(config, run.out)
    with run.timed("text"):
        text = finetuning.prepare_text(resolved, opened)
    with run.timed("load"):
        params = opened.load(config.training.weights, sharding_of(execution.layout))
        other = None
        if teacher is not None:
            teacher_params = teacher.load(config.training.weights, sharding_of(teacher_execution.layout))
            other = finetuning.OtherTeacher(teacher, teacher_params, teacher_execution)
    finetuning.require_memory(config, params)
    paths = [opened.folder, held_out, config.policy.calibration, *([teacher.folder] if teacher else [])]
    depends_on = identity(config, paths, run.implementations) | {"text": text.digest}
    journal = Journal(run.out / "before", depends_on)
    with run.timed("before"):
        before = recover.measure(config, params, text, run_policies.compared, execution, "before", journal)
        taught_by = None
        if other is not None:
            measured = other.params, text, [MODEL_OWN], other.execution
            [taught_by] = recover.measure(config, *measured, "teacher", Journal(run.out / "teacher", depends_on))
    with run.timed("run"):
        given = run_policies, execution, before, other, taught_by
        finished = recover.recover(config, run.out, opened, params, text, *given)
    rows = finetuned.rows(finished)
    finetuned.write(config, run.out, finished, rows)
    figures = finetuned.figures(finished, rows)
    run.finish(figures, rows=rows, text=f"{finetuned.table(rows)}\n\n{finetuned.note(config)}")
    journal.forget()
    Journal(run.out / "teacher", depends_on).forget()


def open_teacher(run, student):
    """The checkpoint of finetune.teacher and how it runs, checked against the trained model's; None if it is none."""
    from moe_jax import checkpoint
    from moe_jax.training import finetuning

    config = run.config
    if not config.finetune.teacher:
        return None, None
    teacher = checkpoint.open(
        command.in_repository(config.finetune.teacher, "finetune.teacher"), calibration=None, setting="finetune.teacher"
    )
    finetuning.require_teacher(config, student, teacher)
    execution = run.execution_of(teacher.architecture, config.training.weights)
    return teacher, dataclasses.replace(execution, k_max=max(execution.k_max, teacher.architecture.moe.k))


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "finetune_demo.gin"),
        default_out="out/finetune",
        huge_pages=True,
        on_mesh=True,
    )
