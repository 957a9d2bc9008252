"""Errors of launch/finetune.py before it trains: one line, and no files remain."""

import os
import shutil
from typing import NamedTuple

import psutil
import pytest
from safetensors.numpy import load_file

import moe_jax
from moe_jax.config.gin import read_config
from moe_jax.training import finetuning
from tests import tiny_training
from tests.faults import launched
from tests.training.finetuned import finetune, texts, write_lines

WITHOUT_LANGUAGE = {"objective.language_model": 0.0, "objective.distillation": 1.0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"policy.spec": "topk:8"} | WITHOUT_LANGUAGE,
            r"policy.spec = 'topk:8' keeps all 8 experts, .* expected fewer",
        ),
        ({"policy.spec": "model"} | WITHOUT_LANGUAGE, r"policy.spec = 'model' keeps all 8 experts, .* expected fewer"),
        ({"policy.spec": "opportunistic:3"}, r"policy.spec = 'opportunistic:3' looks at all rows of a decode step"),
        ({"policy.spec": "layers:3,2,1"}, r"policy 'layers:3,2,1': .*the model's 2"),
        ({"evaluation.policies": ("topk:1", "oportunistic:3")}, r'did you mean "opportunistic:3"'),
        ({"evaluation.policies": ("topk:1", "opportunistic:3")}, r"'opportunistic:3', which looks at all rows"),
        ({"evaluation.half": "even"}, r"evaluation.half = 'even': expected '', the odd half is"),
        (
            {"finetune.rollouts": 4, "training.sequence_length": 16},
            r"training.sequence_length = 16: with finetune.rollouts, expected more than",
        ),
        ({"model.expert_dtype": "int8"}, r"model.expert_dtype = 'int8': weights in eight bits have no gradient"),
        ({"finetune.elastic": True, "finetune.k_min": 9}, r"finetune.k_min = 9: expected at most the model's own 8"),
        ({"finetune.elastic": True, "finetune.k_weights": (1.0, 2.0)}, r"finetune.k_weights has 2 numbers: expected 8"),
        ({"training.sequence_length": 64}, r"training.sequence_length = 64: .* the model's context of 32"),
        ({"text.held_out": "nowhere"}, r"text.held_out = '.*nowhere'"),
        ({"model.path": "nowhere"}, r"model.path = 'nowhere' does not exist"),
        ({"moe.k": 4}, r"moe.k = 4: expected the model's own, 8.*policy.spec=topk:4"),
    ],
)
def test_refused_before_the_weights_are_read(model, sources, tmp_path, settings, says):
    """The model has no weights, so reading them would give another error. No files remain."""
    shape = tmp_path / "shape"
    shutil.copytree(model, shape)
    os.remove(shape / "model.safetensors")
    with pytest.raises(ValueError, match=says) as refusal:
        finetune(shape, sources, tmp_path / "out", **settings)
    assert len(str(refusal.value).splitlines()) == 1
    assert launched.entries(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"training.learning_rate": 0.0}, r"training.learning_rate = 0.0: expected a positive number"),
        ({"finetune.train": "rooter"}, r"finetune.train = 'rooter': expected one of all, router, "),
        ({"policy.spec": "opportunistic:3"}, r"policy.spec = 'opportunistic:3' looks at all rows"),
    ],
)
def test_a_process_ends_with_one_line_and_status_2(model, sources, tmp_path, settings, says):
    """As above; errors of the configuration itself come before JAX is imported (`faults/test_configs.py`)."""
    flags = [f"--set={override}" for override in tiny_training.finetuning_overrides(sources, model, **settings)]
    ended = launched.run("finetune", *flags, "--out=out", folder=tmp_path)
    assert launched.not_refused(ended, says) == ""
    assert launched.entries(tmp_path) == set()


def test_text_shorter_than_a_batch_is_refused(model, sources, tmp_path):
    path = tmp_path / "short.jsonl"
    write_lines(path, texts(1, 50))
    with pytest.raises(
        ValueError, match=r"text.sources has \d+ tokens, \d rows .* expected at least the 32 rows"
    ) as raised:
        more = {"training.batch_size": 8, "training.accumulation": 4}
        finetune(model, sources, tmp_path / "out", **{"text.sources": (str(path),)}, **more)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_text_that_leaves_nothing_to_train_on_is_refused(model, sources, tmp_path, count):
    path = tmp_path / "few.jsonl"
    write_lines(path, texts(count))
    with pytest.raises(ValueError, match=rf"text.sources has {count} documents, .* expected at least 2 held out"):
        finetune(model, sources, tmp_path / "out", **{"text.sources": (str(path),), "text.held_out": ""})


def test_a_damaged_line_is_named(model, sources, tmp_path):
    path = tmp_path / "damaged.jsonl"
    path.write_text('{"text": "as it should be"}\n{"text": "cut\n')
    with pytest.raises(ValueError, match=r"damaged.jsonl, line 2 is not JSON"):
        finetune(model, sources, tmp_path / "out", **{"text.sources": (str(path),)})


class Memory(NamedTuple):
    """The fields of psutil's result."""

    available: int


def test_what_does_not_fit_in_memory_is_refused(model, sources, tmp_path, monkeypatch):
    """Counted by hand: a copy, gradients and two moments of the trained weights, and every layer's input."""
    weights = sum(tensor.size for name, tensor in load_file(model / "model.safetensors").items() if "bias" not in name)
    routers = 2 * 16 * 64
    batch_bytes = 4 * 4 * 32 * 2 * 64
    needed = {"all": 16 * weights + batch_bytes, "router": 16 * routers + batch_bytes}
    settings = {name: {"finetune.train": name} for name in needed}
    config = {
        name: read_config(None, tiny_training.finetuning_overrides(sources, model, **one))
        for name, one in settings.items()
    }
    params = moe_jax.load(model).params
    for name, size_bytes in needed.items():
        monkeypatch.setattr(psutil, "virtual_memory", lambda size_bytes=size_bytes: Memory(size_bytes))
        finetuning.require_memory(config[name], params)
        monkeypatch.setattr(psutil, "virtual_memory", lambda size_bytes=size_bytes: Memory(size_bytes - 1))
        with pytest.raises(
            ValueError, match=rf"finetune.train = '{name}', .* GB of memory, .* available: expected fewer"
        ):
            finetuning.require_memory(config[name], params)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"the model's 0\.0 GB, needs [\d,.]+ GB of memory, [\d,.]+ GB") as raised:
        rows = {"training.batch_size": 10**8}
        finetuning.require_memory(read_config(None, tiny_training.finetuning_overrides(sources, model, **rows)), params)
    assert len(str(raised.value).splitlines()) == 1
