"""A pruned model that the whole one teaches: launch/finetune.py with finetune.teacher."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.likelihood import Likelihood, score_documents
from moe_jax.report import finetuned
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.study import surgery
from moe_jax.study.recover import Recovered
from moe_jax.text.held_out import HeldOut, half, load_held_out
from moe_jax.text.tokenizer import encode_documents
from moe_jax.training.finetuning import FinetuningText
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
    slow = {"training.learning_rate": 3e-4, "finetune.teacher": str(model)}
    out = finetune(pruned, sources, tmp_path / "out", **TAUGHT, **slow)
    found = divergences(out)
    assert found[0] > 0.005 and found[-1] < 0.8 * found[0], found
    result = json.loads((out / "result.json").read_text())
    [row] = result["rows"]
    figures, teacher = row["figures"], result["figures"]["bits_per_byte_teacher"]["value"]
    assert row["policy"] == "model"
    assert figures["bits_per_byte_increase"]["value"] == pytest.approx(figures["bits_per_byte"]["value"] / teacher - 1)
    reported = half(load_held_out(sources / "held_out"), "odd")
    tokens = encode_documents(checkpoint.open(model).tokenizer, reported)
    options = {"context": 32, "batch_size": 16}
    whole = moe_jax.load(model)
    [scored] = score_documents(whole.params, tokens, [MODEL_OWN], execution_of(whole.architecture), **options)
    assert teacher == pytest.approx(scored.bits_J.sum() / sum(document.num_bytes for document in reported), rel=1e-6)
    assert moe_jax.load(out / "model").architecture.moe.num_experts == 10
    assert f"distillation 1 (teacher `{model}`, forward" in (out / "model" / "MODEL_CARD.md").read_text()


def test_recovered_is_the_share_of_the_cost_over_the_teacher():
    def likelihood(*bits):
        return Likelihood(np.array(bits), None, np.ones(3, int), np.ones((1, 2), int), 0)

    bytes_J = [SimpleNamespace(num_bytes=10)] * 3
    text = FinetuningText(None, "", 1, None, HeldOut(bytes_J, []))
    before, after, teacher = likelihood(20.0, 30, 40), likelihood(16.0, 24, 32), likelihood(10.0, 15, 20)
    done = Recovered(MODEL_OWN, [MODEL_OWN], [before], [after], text, 1, 1, 0, 1.0, None, teacher)
    [row] = finetuned.rows(done)
    assert row["figures"]["recovered"]["value"] == pytest.approx((90 - 72) / (90 - 45))
    assert row["figures"]["bits_per_byte_increase"]["value"] == pytest.approx(72 / 45 - 1)
    assert finetuned.figures(done, [row])["bits_per_byte_teacher"]["value"] == pytest.approx(45 / 30)
    [alone] = finetuned.rows(done._replace(taught_by=None))
    assert "recovered" not in alone["figures"]
    assert alone["figures"]["bits_per_byte_increase"]["value"] == pytest.approx(72 / 90 - 1)


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
    refused(model, sources, tmp_path / "out", r"finetune.teacher = .*nowhere", **nowhere)


def test_without_another_teacher_there_is_nothing_to_recover(model, sources, tmp_path):
    refused(model, sources, tmp_path / "out", r"policy.spec = 'model' keeps all 8 experts, .* nothing to recover")
