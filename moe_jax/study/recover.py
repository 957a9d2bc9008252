"""Recovers the quality that fewer experts cost: measures a model, fine-tunes it, exports it, measures the export."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax import checkpoint
from moe_jax.checkpoint import Checkpoint
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import Config
from moe_jax.evaluation.journal import Journal
from moe_jax.evaluation.likelihood import Likelihood, score_documents
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.model.sharding import sharding_of
from moe_jax.routing import policies
from moe_jax.routing.calibration import Calibration
from moe_jax.routing.policies import Policy
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.study.compare import compared_policies
from moe_jax.text.batches import Packed
from moe_jax.training import finetuning, loop, rollouts
from moe_jax.training.elastic import KSampler
from moe_jax.training.finetuning import FinetuningText, OtherTeacher


class RecoveryPolicies(NamedTuple):
    """The policies of a run, checked against the model before its weights are read."""

    trained: Policy  # to train under; the model's own if k is sampled
    compared: Sequence[Policy]  # to measure under: the full model first


class Recovered(NamedTuple):
    """The results of a run, on the reported half of the held-out text."""

    trained: Policy
    compared: Sequence[Policy]
    before: Sequence[Likelihood]
    after: Sequence[Likelihood]
    text: FinetuningText
    step: int  # the step after which the model was best on the watched half
    steps: int  # steps of the run
    masked_experts: int  # in all layers
    tokens_per_s: float  # median over the run
    overflow: int | None  # slots that the run dropped; None: none can be
    taught_by: Likelihood | None  # of the model of `finetune.teacher`; None: the model as loaded


def recovery_policies(
    config: Config, architecture: Architecture, calibration: Calibration | None = None
) -> RecoveryPolicies:
    """The policies of a run: the full model, the trained one, and `evaluation.policies`.

    Raises:
        ValueError: a policy does not fit the model, or looks at other rows of a decode step; there is nothing to
            recover, see `finetuning.trained_policy`; k cannot be sampled as configured, see `elastic.KSampler`; rows
            are too short for rollouts; or `evaluation.half` is set.
    """
    if config.finetune.rollouts and config.training.sequence_length <= rollouts.PROMPT:
        raise ValueError(
            f"training.sequence_length = {config.training.sequence_length}: with finetune.rollouts, expected more than "
            f"the {rollouts.PROMPT} tokens that each rollout continues"
        )
    trained = finetuning.trained_policy(config, architecture, calibration)
    if config.finetune.elastic:
        KSampler(config.finetune, architecture, config.training.batch_size, config.run.seed)
    config.mesh.require_trainable()
    for setting in ("training", "evaluation"):
        config.mesh.require_batch(f"{setting}.batch_size", getattr(config, setting).batch_size)
    if config.evaluation.half:
        raise ValueError(f"evaluation.half = {config.evaluation.half!r}: expected '', the odd half is always reported")
    k_max = max(config.policy.k_max, architecture.moe.k)
    policies.settings([trained], architecture, k_max)
    others = compared_policies(config.evaluation, architecture, k_max, calibration)
    return RecoveryPolicies(trained, list(dict.fromkeys([MODEL_OWN, trained, *others])))


def measure(
    config: Config,
    params: Params,
    text: FinetuningText,
    compared: Sequence[Policy],
    execution: Execution,
    name: str,
    journal: Journal | None = None,
) -> list[Likelihood]:
    """The likelihood of the reported half of the held-out text under each policy.

    The progress bar shows `name`. Finished parts are kept in the journal, if there is one.
    """
    return score_documents(
        params,
        text.reported.tokens,
        compared,
        execution.exact,
        context=config.training.sequence_length,
        batch_size=config.evaluation.batch_size,
        journal=journal,
        progress=name,
    )


def recover(
    config: Config,
    folder: pathlib.Path,
    model: Checkpoint,
    params: Params,
    text: FinetuningText,
    run_policies: RecoveryPolicies,
    execution: Execution,
    before: Sequence[Likelihood],
    teacher: OtherTeacher | None = None,
    taught_by: Likelihood | None = None,
) -> Recovered:
    """Fine-tunes, exports to `folder/model`, and measures the export; resumes a killed run.

    The export has the layout, dtype and family of the original model, and its other files except its calibration and
    the pages about it. If the policy keeps a fixed number of experts per layer, that becomes the exported model's own
    k: in the family's field of config.json if it is the same in all layers, else in `num_experts_per_tok_of_layers`.

    Args:
        config: reads `training`, `objective` and `finetune`.
        folder: the run's folder.
        model: the model to fine-tune.
        params: its weights.
        text: from `finetuning.prepare_text`.
        run_policies: from `recovery_policies`.
        execution: static settings of the full model.
        before: from `measure`, under `run_policies.compared`.
        teacher: the model of `finetune.teacher`, if it is another one. It also writes the rollouts.
        taught_by: from `measure`, of that model with its own k.
    """
    if config.finetune.rollouts:
        writer = (teacher.params, teacher.execution) if teacher else (params, execution)
        text = text._replace(packed=_rollouts(config, folder / "rollouts", model, text, *writer))
    tuned = finetuning.finetune(config, folder, params, text, run_policies.trained, execution, teacher)
    architecture = policies.with_own(run_policies.trained, model.architecture) or model.architecture
    exported = model.for_new_weights().with_architecture(architecture)
    exported.save(folder / "model", tuned.params, dtype=model.stored_dtype, replace=True)
    saved = checkpoint.open(folder / "model")
    exported_params = saved.load(config.training.weights, sharding_of(execution.layout))
    after = measure(config, exported_params, text, run_policies.compared, execution, "after")
    logged = loop.median_tokens_per_s(folder), loop.overflow_slots(folder)
    return Recovered(
        *run_policies, before, after, text, tuned.step, tuned.steps, tuned.masked_experts, *logged, taught_by
    )


def _rollouts(
    config: Config, folder: pathlib.Path, model: Checkpoint, text: FinetuningText, params: Params, execution: Execution
) -> Packed:
    settings = {"count": config.finetune.rollouts, "seed": config.run.seed, "folder": folder}
    return rollouts.write(params, model.require_tokenizer(), model.end_ids, execution.exact, text.packed, **settings)
