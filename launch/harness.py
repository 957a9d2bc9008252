"""Runs tasks of lm-evaluation-harness under every policy of `evaluation.policies`, side by side.

    python launch/harness.py --config configs/harness_demo.gin --tasks held_out_next_line,held_out_bits --limit 40

--tasks takes names of lm-eval's own tasks, groups and tags, whose data lm-eval downloads; of tasks in assets/tasks,
which need no network; and of tasks in folders given by --include. Intervals are 95%; differences from the first policy
are paired by document. OUT/samples.jsonl has every document's metrics under every policy.
"""

import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import sys

from absl import flags

from moe_jax import command, files

ROOT = pathlib.Path(__file__).parents[1]
OURS = ROOT / "assets" / "tasks"
INSTALL = 'pip install "lm-eval>=0.4.13,<0.5"'
BOOTSTRAPS = 1000  # resamplings by the harness itself, for metrics such as F1

TASKS = flags.DEFINE_list("tasks", [], "Names of tasks, separated by commas.")
INCLUDE = flags.DEFINE_multi_string("include", [], "A folder of further tasks (YAML); repeat it for more.")
LIMIT = flags.DEFINE_integer("limit", None, "Use only the first LIMIT documents of each task.", lower_bound=1)
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in each prompt. Default: the task's.", lower_bound=0)
CHAT = flags.DEFINE_bool("chat", False, "Put prompts into the model's chat template.")


def main(run: command.Command) -> None:
    """Checks flags and configuration, then loads the model and runs the tasks under each policy."""
    config = run.config
    if not TASKS.value:
        raise ValueError("--tasks: expected at least one name, such as --tasks held_out_next_line")
    require_lm_eval()
    folders = include_folders()

    from moe_jax.engine.request import policy_of_each
    from moe_jax.evaluation.continuations import require_row_wise, settings_of
    from moe_jax.evaluation.harness import LanguageModel
    from moe_jax.report import harnessed
    from moe_jax.text import chat

    opened, execution = run.open_model()
    compared = policy_of_each(config.evaluation.policies, len(config.evaluation.policies), opened.calibration)
    for policy in compared:
        settings_of(policy, 1, execution)
    tokenizer = opened.require_tokenizer()
    if CHAT.value:
        chat.load_template(opened.folder)
    run.implementations["tasks"] = f"lm-eval {importlib.metadata.version('lm-eval')}"
    with run.timed("tasks"):
        manager = task_manager(folders)
        tasks, output_types = load_tasks(manager)
    if output_types != {"generate_until"}:
        for policy in compared:
            require_row_wise(policy)

    engine = run.load(opened).engine
    specs, results, truncated = [policy.spec for policy in compared], [], []
    for policy in compared:
        settings = {"policy": policy, "batch_size": config.evaluation.batch_size, "seed": config.run.seed}
        with run.timed("run"):
            result, count = evaluate(
                LanguageModel(opened.folder, engine, tokenizer, execution, **settings), tasks, manager
            )
        results.append(result)
        truncated.append(count)

    rows = harnessed.rows(specs, results)
    for row, result, count in zip(rows, results, truncated):
        for task, documents in result["n-samples"].items():
            row["figures"][f"{task}/documents"] = {"value": documents["effective"], "unit": "documents"}
        row["figures"]["truncated_contexts"] = {"value": count, "unit": "requests"}
    write_samples(run.out, specs, results)
    run.finish(rows[0]["figures"], rows=rows, text=harnessed.table(rows))


def evaluate(model, tasks: list, manager) -> tuple[dict, int]:
    """The harness's results under one policy, and the number of contexts that were truncated at their beginning."""
    from lm_eval import simple_evaluate

    asked = {"limit": LIMIT.value, "num_fewshot": NUM_FEWSHOT.value, "apply_chat_template": CHAT.value}
    result = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=BOOTSTRAPS, **asked)
    return result, model.num_truncated


def require_lm_eval() -> None:
    """Raises ValueError without lm-eval; else quiets it and turns off its forks, which JAX does not survive."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"lm-eval is not installed: {INSTALL}")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, to hide the harness's bars
    for library in ("lm_eval", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)


def include_folders() -> list[pathlib.Path]:
    """Folders of tasks, beside lm-eval's own."""
    for name in INCLUDE.value:
        if not pathlib.Path(name).is_dir():
            raise ValueError(f"--include = {name!r}: expected a folder of tasks")
    return [OURS, *map(pathlib.Path, INCLUDE.value)]


def task_manager(folders: list[pathlib.Path]):
    """The harness's task manager; it lists lm-eval's own tasks, which takes seconds, only if one of them is named."""
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in TASKS.value]
    local = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(local.all_subtasks):
        return local
    everything = TaskManager(include_path=folders)
    for name in names:
        if name not in everything.all_tasks:
            near = difflib.get_close_matches(name, everything.all_tasks, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            places = ", ".join(map(str, folders))
            version = importlib.metadata.version("lm-eval")
            raise ValueError(f"--tasks: {name!r} is not a task of lm-eval {version} or of {places}{hint}")
    return everything


def load_tasks(manager) -> tuple[list, set[str]]:
    """The named tasks and groups with their data, each once, and the types of output that they need."""
    loaded = manager.load([name.strip() for name in TASKS.value])
    within = {name for children in loaded["group_map"].values() for name in children}
    groups = [group for name, group in loaded["groups"].items() if name not in within]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    alone = [task for name, task in loaded["tasks"].items() if name not in grouped]
    return [*groups, *alone], {task.OUTPUT_TYPE for task in loaded["tasks"].values()}


def write_samples(out: pathlib.Path | None, specs: list[str], results: list[dict]) -> None:
    """Writes the metrics of each policy, task, document and filter, one line of JSON each."""
    if out is None:
        return
    lines = []
    for spec, result in zip(specs, results):
        for task, samples in result["samples"].items():
            for sample in samples:
                line = {"policy": spec, "task": task, "document": sample["doc_id"], "filter": sample["filter"]}
                line |= {name: sample[name] for name in sample["metrics"]}
                lines.append(json.dumps(command.plain(line), ensure_ascii=False, allow_nan=False, default=str) + "\n")
    files.write_atomically(out / "samples.jsonl", "".join(lines).encode(errors="backslashreplace"))


if __name__ == "__main__":
    command.run(
        main,
        default_config=os.path.relpath(ROOT / "configs" / "harness_demo.gin"),
        default_out="out/harness",
        huge_pages=True,
    )
