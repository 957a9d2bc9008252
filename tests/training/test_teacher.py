"""A pruned model that the whole one teaches: launch/finetune.py with finetune.teacher."""

import json
import shutil

import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.study import surgery
from tests import tiny_model
from tests.training.finetuned import finetune

KEPT = [np.arange(2, 12), np.arange(10)]  # of 16; expert 5 is idle in both layers
TAUGHT = {"policy.spec": "model", "objective.language_model": 0.0, "objective.distillation": 1.0}


@pytest.fixture(scope="module")
def pruned(model, tmp_path_factory):
    whole = checkpoint.open(model)
    params = surgery.without_others(whole.read(), whole.architecture, KEPT)
    smaller = whole.for_new_weights().with_architecture(surgery.architecture_of(whole.architecture, KEPT))
    folder = tmp_path_factory.mktemp("pruned") / "model"
    smaller.save(folder, params)
    return folder


def divergences(out):
    return [
        json.loads(line)["divergence"] for line in (out / "metrics.jsonl").read_text().splitlines() if "div" in line
    ]


@pytest.mark.processes
def test_the_whole_model_teaches_a_pruned_one(model, pruned, sources, tmp_path):
    """It comes nearer to the whole model. If the student were its own teacher, the divergence would start at 0."""
    out = finetune(pruned, sources, tmp_path / "out", **TAUGHT, **{"finetune.teacher": str(model)})
    found = divergences(out)
    assert found[0] > 0.05 and found[-1] < 0.8 * found[0]
    result = json.loads((out / "result.json").read_text())
    [row] = result["rows"]
    figures = row["figures"]
    assert row["policy"] == "model" and figures["recovered"]["value"] > 0
    teacher = result["figures"]["bits_per_byte_teacher"]["value"]
    before, after = figures["bits_per_byte_before"]["value"], figures["bits_per_byte"]["value"]
    assert figures["recovered"]["value"] == pytest.approx((before - after) / (before - teacher))
    assert figures["bits_per_byte_increase"]["value"] == pytest.approx(after / teacher - 1)
    assert checkpoint.open(out / "model").architecture.moe.num_experts == 10
    assert f"distillation 1 (teacher `{model}`, forward" in (out / "model" / "MODEL_CARD.md").read_text()
    moe_jax.load(out / "model")


def refused(student, sources, out, says, **settings):
    with pytest.raises(ValueError, match=says) as refusal:
        finetune(student, sources, out, **(TAUGHT | {name.replace("__", "."): one for name, one in settings.items()}))
    assert len(str(refusal.value).splitlines()) == 1
    assert [path.name for path in out.iterdir()] == []


def test_what_cannot_teach_is_refused(model, sources, tmp_path):
    def of(name, **sections):
        return str(tiny_model.write_model(tmp_path / name, tiny_model.changed(**sections)))

    other = of("vocabulary", decoder={"vocab_size": 448})
    refused(model, sources, tmp_path / "out", r"finetune.teacher = .* has a vocabulary of 448", finetune__teacher=other)
    narrow = of("narrow", decoder={"d_model": 48})
    hidden = {"finetune__teacher": narrow, "objective__hidden": 1.0}
    refused(model, sources, tmp_path / "out", r"states of width 48: expected 64, or objective.hidden=0", **hidden)
    short = of("short", decoder={"max_context": 16})
    refused(model, sources, tmp_path / "out", r"sequence_length = 32: expected at most the 16", finetune__teacher=short)
    unused = {"finetune__teacher": str(model), "objective__distillation": 0.0, "objective__language_model": 1.0}
    refused(model, sources, tmp_path / "out", r"finetune.teacher = .*: expected objective.distillation or", **unused)
    shutil.copytree(model, tmp_path / "words")
    text = (model / "tokenizer.json").read_text()
    (tmp_path / "words" / "tokenizer.json").write_text(
        text.replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    told = {"finetune__teacher": str(tmp_path / "words")}
    refused(model, sources, tmp_path / "out", r"expected a model with the tokenizer of model.path", **told)
    nowhere = {"finetune__teacher": "nowhere"}
    refused(model, sources, tmp_path / "out", r"finetune.teacher|nowhere", **nowhere)


def test_without_another_teacher_there_is_nothing_to_recover(model, sources, tmp_path):
    refused(model, sources, tmp_path / "out", r"policy.spec = 'model' keeps all 8 experts, .* nothing to recover")
