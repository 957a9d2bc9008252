import pathlib
from typing import NamedTuple

import pytest

from tests import tiny_model, tiny_training
from tests.faults import launched


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model without an end-of-text token: it generates as many tokens as asked for."""
    architecture = tiny_model.changed(decoder={"max_context": 256})
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", architecture, token_ids={})


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    return tiny_training.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def training_flags(sources):
    """Nine steps, with a checkpoint every third step."""
    few = {"training.steps": 9, "training.checkpoint_every": 3, "training.evaluate_every": 9}
    overrides = tiny_training.overrides(sources, **few, **{"evaluation.policies": ("model",)})
    return [f"--set={override}" for override in overrides]


@pytest.fixture(scope="session")
def trained(training_flags, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = launched.run("train", *training_flags, "--out=out", folder=folder)
    assert ended.status == 0, ended.stderr
    return folder / "out"


@pytest.fixture(scope="session")
def finetuning_flags(sources, model):
    """Nine steps with a teacher, with an evaluation and a checkpoint every third step."""
    few = {"training.steps": 9, "training.evaluate_every": 3, "evaluation.policies": ("model", "topk:1")}
    overrides = tiny_training.finetuning_overrides(sources, model, **tiny_training.TAUGHT, **few)
    return [f"--set={override}" for override in overrides]


@pytest.fixture(scope="session")
def finetuned(finetuning_flags, tmp_path_factory):
    """The folder of an undisturbed fine-tuning run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = launched.run("finetune", *finetuning_flags, "--out=out", folder=folder)
    assert ended.status == 0, ended.stderr
    return folder / "out"


class Undisturbed(NamedTuple):
    """A launcher that trains, its flags, and the folder of an undisturbed run."""

    launcher: str
    flags: list[str]
    out: pathlib.Path


@pytest.fixture(scope="session", params=["train", "finetune"])
def training_run(request):
    """Each launcher that trains, in turn."""
    names = {"train": ("training_flags", "trained"), "finetune": ("finetuning_flags", "finetuned")}[request.param]
    return Undisturbed(request.param, *map(request.getfixturevalue, names))
