"""Prunes a model in several ways: ranks its experts on text, and measures each smaller model on other text."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import memory
from moe_jax.checkpoint import Checkpoint
from moe_jax.config.architecture import Architecture
from moe_jax.config.schema import Config
from moe_jax.evaluation.journal import Journal
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.model import parameters
from moe_jax.model.decoder import Params
from moe_jax.model.execution import Execution
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.study import expert_statistics, pruning, surgery
from moe_jax.study.compare import window_of
from moe_jax.study.expert_statistics import CalibrationRows, ExpertStatistics
from moe_jax.study.pruning import Kept, PruningChoice
from moe_jax.text.documents import Document
from moe_jax.text.held_out import HeldOut, half
from moe_jax.text.tokenizer import encode_documents


class PruningText(NamedTuple):
    """The text that experts are ranked on, and the text that models are measured on."""

    calibration: CalibrationRows
    held_out: HeldOut


class Pruned(NamedTuple):
    """A smaller model and its result."""

    choice: PruningChoice
    kept: Kept
    architecture: Architecture
    bits_J: np.ndarray  # float64, of each held-out document


def prepare_text(
    config: Config, model: Checkpoint, training: Sequence[Document], held_out: Sequence[Document]
) -> PruningText:
    """Picks and encodes the text; calibration takes documents in random order, by `run.seed`.

    Args:
        config: reads `prune`, `evaluation` and `run`.
        model: the model to prune.
        training: documents to rank experts on.
        held_out: all held-out documents, of which `evaluation.half` and `evaluation.documents` choose.
    """
    tokenizer, context = model.require_tokenizer(), model.architecture.decoder.max_context

    def shuffled() -> Iterator[np.ndarray]:
        for number in np.random.default_rng(config.run.seed).permutation(len(training)):
            yield from encode_documents(tokenizer, [training[number]])

    length = min(config.prune.sequence_length, context)
    documents = half(held_out, config.evaluation.half)[: config.evaluation.documents or None]
    return PruningText(
        expert_statistics.rows_of(shuffled(), length, config.prune.tokens),
        HeldOut(documents, encode_documents(tokenizer, documents)),
    )


def require_memory(params: Params, architecture: Architecture, choices: Sequence[PruningChoice]) -> None:
    """Checks that the largest smaller model fits beside the whole one, on the host and on the device."""
    experts = max(choice.keep for choice in choices)
    smaller = surgery.with_experts(architecture, (experts,) * len(architecture.k_L))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    needed = round(weights * parameters.count(smaller) / parameters.count(architecture))
    available = min(memory.host_bytes(), memory.device_bytes())
    memory.require(f"a model with {experts} experts beside the whole one", needed, available, "a narrower model.dtype")


def num_parts(text: PruningText, choices: Sequence[PruningChoice]) -> int:
    """How often `run` calls `advance`."""
    return len(text.calibration.tokens_JT) // expert_statistics.ROWS + 1 + len(choices)


def rank(
    params: Params, text: PruningText, execution: Execution, journal: Journal, advance: Callable[[], object]
) -> ExpertStatistics:
    """The statistics of every expert on the calibration text, kept in the journal."""

    def compute():
        return expert_statistics.measure(params, text.calibration, execution, advance)._asdict()

    return ExpertStatistics(**journal.once("statistics", compute))


def measure(
    config: Config,
    params: Params,
    text: PruningText,
    choices: Sequence[PruningChoice],
    statistics: ExpertStatistics,
    execution: Execution,
    execution_of: Callable[[Architecture], Execution],
    journal: Journal,
    advance: Callable[[], object],
) -> tuple[np.ndarray, list[Pruned]]:
    """Makes and measures each smaller model, with the model's own k.

    Args:
        config: reads `evaluation` and `run.seed`.
        params: of the whole model.
        text: the held-out text is measured on.
        choices: from `pruning.choices`.
        statistics: from `rank`.
        execution: static settings of the whole model.
        execution_of: those of another architecture.
        journal: keeps the bits of each model.
        advance: called after each model, the whole one included.

    Returns:
        bits_J of the whole model, and the smaller models.
    """

    def bits_of(name: str, params: Callable[[], Params], execution: Execution) -> np.ndarray:
        def compute():
            settings = {"context": window_of(config.evaluation, execution.architecture)}
            settings["batch_size"] = config.evaluation.batch_size
            [scored] = score_documents(params(), text.held_out.tokens, [MODEL_OWN], execution, **settings)
            return {"bits_J": scored.bits_J}

        bits_J = journal.once(f"bits-{name}", compute)["bits_J"]
        advance()
        return bits_J

    full_J, architecture = bits_of("model", lambda: params, execution), execution.architecture
    found = []
    for choice in choices:
        kept = pruning.kept(choice, architecture, statistics, config.run.seed)
        smaller = surgery.architecture_of(architecture, kept)

        def make(kept=kept) -> Params:
            return jax.device_put(surgery.without_others(params, architecture, kept))

        found.append(Pruned(choice, kept, smaller, bits_of(choice.name, make, execution_of(smaller))))
    return full_J, found


def export(config: Config, folder: pathlib.Path, model: Checkpoint, measured: Sequence[Pruned]) -> None:
    """Writes the models of `prune.export` to `folder/NAME`, with the dtype and other files of the original.

    The weights are those stored, whatever dtype they were measured in.
    """
    asked = [one for one in measured if one.choice.name in config.prune.export]
    stored = model.read() if asked else {}
    for choice, kept, architecture, _ in asked:
        params = surgery.without_others(stored, model.architecture, kept)
        smaller = model.for_new_weights().with_architecture(architecture)
        smaller.save(folder / choice.name, params, replace=True)
