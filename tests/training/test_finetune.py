"""launch/finetune.py on a tiny model: what it measures and exports. `faults/` kills it, `peers/` load the export."""

import contextlib
import csv
import json
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint.orbax import Checkpoints
from moe_jax.config.gin import read_config
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.routing.policies.parse import MODEL_OWN, parse
from moe_jax.study import recover
from moe_jax.text.documents import Document
from moe_jax.text.held_out import half, load_held_out
from moe_jax.text.tokenizer import encode_documents, load_tokenizer
from moe_jax.training import finetuning
from tests import tiny_model, tiny_training
from tests.faults import launched
from tests.training.finetuned import IDLE, finetune, texts, write_lines

pytestmark = pytest.mark.processes

NOTHING_MOVES = {"training.learning_rate": 1e-30}  # no float32 weight of the model is so small that it would


def figures_of(out):
    """The figures of each policy."""
    return {row["policy"]: row["figures"] for row in json.loads((out / "result.json").read_text())["rows"]}


def changed_tensors(model, out):
    """Names of the tensors that differ between the exported model and the original."""
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out / "model"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(np.float32)}
    return {name for name, tensor in before.items() if tensor.tobytes() != after[name].tobytes()}


def with_own_k(out, folder):
    """The exported weights with the configuration of the original model, in which k is 8."""
    shutil.copytree(out / "model", folder)
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("num_experts_per_tok_of_layers", None)
    (folder / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": tiny_model.ARCHITECTURE.moe.k}))
    return moe_jax.load(folder)


def assert_own_k_is(out, folder, policy):
    """The export gives the logits of the same weights with the original k under the policy."""
    tokens_BT = np.random.default_rng(0).integers(1, 320, (5, 30))
    exported, as_trained = moe_jax.load(out / "model"), with_own_k(out, folder)
    logits_BTV = exported.logits(tokens_BT)
    np.testing.assert_array_equal(logits_BTV, as_trained.logits(tokens_BT, policy=policy))
    assert (logits_BTV != as_trained.logits(tokens_BT)).any()


class Done(NamedTuple):
    """A run in its own process, with a teacher and accumulated batches."""

    out: pathlib.Path
    printed: str


@pytest.fixture(scope="module")
def done(model, sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "plain.gin").write_text("")
    settings = {**tiny_training.TAUGHT, "evaluation.policies": ("model", "topk:1")}
    flags = [f"--set={override}" for override in tiny_training.finetuning_overrides(sources, model, **settings)]
    ended = launched.run("finetune", "--config=plain.gin", "--out=out", *flags, folder=folder)
    assert ended.status == 0, ended.stderr
    return Done(folder / "out", ended.stdout)


def test_it_measures_trains_exports_and_measures_again(done):
    result = json.loads((done.out / "result.json").read_text())
    rows = figures_of(done.out)
    assert list(rows) == ["model", "topk:3", "topk:1"]
    for name, figures in rows.items():
        before, after = figures["bits_per_byte_before"]["value"], figures["bits_per_byte"]["value"]
        full = rows["model"]["bits_per_byte_before"]["value"]
        assert after < before - 0.1, f"{name} has learnt nothing"
        assert figures["change"]["value"] == pytest.approx(after / before - 1)
        assert figures["bits_per_byte_increase"]["value"] == pytest.approx(after / full - 1)
        low, high = figures["change"]["ci95"]
        assert low <= figures["change"]["value"] <= high < 0
        assert f"| `{name}` | {before:.4f} (" in done.printed and f"| {after:.4f} (" in done.printed
    assert "recovered" in rows["topk:3"] and "recovered" not in rows["model"]
    own = {name: figure for name, figure in result["figures"].items() if name in rows["topk:3"]}
    assert own == rows["topk:3"]
    assert result["figures"]["steps"]["value"] == result["figures"]["best_step"]["value"] == 12
    assert result["figures"]["training_tokens_per_s"]["value"] > 0
    assert set(result["seconds"]) == {"text", "load", "before", "run"}
    card = (done.out / "model" / "MODEL_CARD.md").read_text()
    assert all(line in card for line in done.printed.strip().splitlines())
    assert "trained under: policy `topk:3`; trained parameters: all" in card and "12 steps of 256 tokens" in card
    assert "objective: language_model 0.5, distillation 0.5 (forward, temperature 1)" in card
    assert (done.out / "model" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    terms = json.loads((done.out / "metrics.jsonl").read_text().splitlines()[0])
    assert terms["loss"] > 0 and terms["divergence"] > 0


def test_the_reported_bits_are_those_of_the_two_models(done, model, sources):
    """Document by document, for the reported half, with the original model and the exported one."""
    reported = half(load_held_out(sources / "held_out"), "odd")
    with open(done.out / "documents.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [document.name for document in reported]
    compared = {"model": MODEL_OWN, "topk:3": parse("topk:3"), "topk:1": parse("topk:1")}
    sizes = [int(line["bytes"]) for line in lines]
    rows = figures_of(done.out)
    for when, folder, policies, suffix in (
        ("before", model, compared, "_before"),
        ("after", done.out / "model", {"topk:3": MODEL_OWN, "topk:1": parse("topk:1")}, ""),
    ):
        tokens = encode_documents(load_tokenizer(folder), reported)
        loaded = moe_jax.load(folder)
        options = {"context": 32, "batch_size": 16}
        scored = score_documents(
            loaded.params, tokens, list(policies.values()), execution_of(loaded.architecture), **options
        )
        for name, likelihood in zip(policies, scored):
            written = [float(line[f"{when} {name}"]) for line in lines]
            np.testing.assert_allclose(written, likelihood.bits_J, rtol=1e-5)
            assert rows[name]["bits_per_byte" + suffix]["value"] == pytest.approx(sum(written) / sum(sizes), rel=1e-6)


def test_the_k_of_the_policy_is_the_exported_models_own(done, tmp_path):
    fields = json.loads((done.out / "model" / "config.json").read_text())
    assert fields["num_experts_per_tok"] == 3 and "num_experts_per_tok_of_layers" not in fields
    assert checkpoint.open(done.out / "model").architecture == tiny_model.changed(moe={"k": 3})
    assert_own_k_is(done.out, tmp_path / "as_trained", "topk:3")


def test_another_k_in_each_layer_while_only_routers_train(model, sources, tmp_path):
    out = finetune(model, sources, tmp_path / "out", **{"policy.spec": "layers:4,2", "finetune.train": "router"})
    fields = json.loads((out / "model" / "config.json").read_text())
    assert (fields["num_experts_per_tok"], fields["num_experts_per_tok_of_layers"]) == (4, [4, 2])
    assert checkpoint.open(out / "model").architecture.moe.k_of_layers == (4, 2)
    assert_own_k_is(out, tmp_path / "as_trained", "layers:4,2")
    assert changed_tensors(model, out) == {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)}


def test_only_routers_and_norms_train(model, sources, tmp_path):
    out = finetune(model, sources, tmp_path / "out", **{"finetune.train": "router_and_norms"})
    names = load_file(model / "model.safetensors")
    expected = {name for name in names if "norm" in name or name.endswith("mlp.gate.weight")}
    assert len(expected) == 3 * 4 + 1 + 2  # two norms of each layer, two of its heads, the last one; two routers
    assert changed_tensors(model, out) == expected


def test_lora_changes_attention_and_the_experts_that_got_tokens(model, sources, tmp_path):
    settings = {"finetune.train": "lora", "finetune.lora_rank": 2, "training.learning_rate": 0.03}
    out = finetune(model, sources, tmp_path / "out", **settings)
    names = load_file(model / "model.safetensors")
    adapted = {name for name in names if "self_attn" in name and "norm" not in name}
    adapted |= {name for name in names if ".shared_experts." in name}
    changed = changed_tensors(model, out)
    routed = {name.rsplit(".", 2)[0] for name in changed if ".experts." in name}  # layer and expert
    assert not any(name.endswith(f".{IDLE}") for name in routed)
    # which other experts no token chose depends on the text; test_trainable.py compares them one by one
    assert 0.8 * 2 * (tiny_model.ARCHITECTURE.moe.num_experts - 1) <= len(routed)
    routed_experts = {name for name in names if ".experts." in name and name.rsplit(".", 2)[0] in routed}
    assert changed == adapted | routed_experts
    assert figures_of(out)["topk:3"]["change"]["value"] < -0.01


def test_an_elastic_model_keeps_its_own_k(model, sources, tmp_path):
    settings = {"finetune.elastic": True, "policy.spec": "topk:2", "evaluation.policies": ("topk:1", "topk:8")}
    out = finetune(model, sources, tmp_path / "out", **settings)
    assert checkpoint.open(out / "model").architecture == tiny_model.ARCHITECTURE
    assert list(figures_of(out)) == ["model", "topk:1", "topk:8"]
    assert all(figures["change"]["value"] < -0.01 for figures in figures_of(out).values())
    figures = json.loads((out / "result.json").read_text())["figures"]
    assert figures["bits_per_byte"] == figures_of(out)["model"]["bits_per_byte"]
    assert "trained under: k drawn per layer from 1 on" in (out / "model" / "MODEL_CARD.md").read_text()
    used = [json.loads(line).get("effective_experts") for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(set(used)) > 6 and max(filter(None, used)) - min(filter(None, used)) > 1  # k differs between steps


def test_it_stops_without_improvement_and_keeps_the_best(model, sources, tmp_path):
    """No step changes the model, so the first evaluation stays the best."""
    settings = {"training.evaluate_every": 2, "finetune.patience": 2, **NOTHING_MOVES}
    out = finetune(model, sources, tmp_path / "out", **settings)
    figures = json.loads((out / "result.json").read_text())["figures"]
    assert (figures["steps"]["value"], figures["best_step"]["value"]) == (6, 2)
    assert figures["change"]["value"] == 0
    assert changed_tensors(model, out) == set()
    again = finetune(model, sources, out, **settings)  # a finished run stays finished
    assert json.loads((again / "result.json").read_text())["figures"]["steps"]["value"] == 6


def test_documents_are_held_out_if_none_are_given(model, sources, tmp_path):
    """From JSON lines. Near-duplicates of held-out texts are not trained on."""
    lines, path = texts(40), tmp_path / "lines.jsonl"
    settings = {"text.sources": (str(path),), "text.held_out": "", "finetune.held_out_fraction": 0.25}
    config = read_config(None, tiny_training.finetuning_overrides(sources, model, **settings))

    def prepared(lines):
        write_lines(path, lines)
        text = finetuning.prepare_text(config, checkpoint.open(model))
        return text, [document.name for held in (text.watched, text.reported) for document in held.documents]

    text, held = prepared(lines)
    assert len(held) == len(set(held)) == 10 and set(held) <= {f"lines.jsonl:{number}" for number in range(1, 41)}
    assert text.num_documents == 30
    tokens = sum(map(len, encode_documents(load_tokenizer(model), [Document("", "", one) for one in lines])))
    held_tokens = sum(len(ids) for half in (text.watched, text.reported) for ids in half.tokens)
    assert text.packed.num_tokens + held_tokens == tokens
    twin = text.reported.documents[-1]
    for number in range(20):  # until exactly one of the two is held out
        more, held = prepared([*lines, f"{twin.text}\n# copy {number}\n"])
        if (twin.name in held) != ("lines.jsonl:41" in held):
            break
    assert more.num_documents == 41 - len(held) - 1 and more.digest != text.digest

    write_lines(path, lines)
    out = finetune(model, sources, tmp_path / "out", **settings, **NOTHING_MOVES, **{"training.steps": 3})
    with open(out / "documents.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["source"], row["name"]) for row in rows] == [
        (str(path), document.name) for document in text.reported.documents
    ]


def test_divergence_stops_and_keeps_the_last_good_checkpoint(model, sources, tmp_path):
    out = tmp_path / "out"
    settings = {"training.learning_rate": 1e25, "training.checkpoint_every": 1, "training.evaluate_every": 12}
    with pytest.raises(ValueError, match=r"step \d+ is not finite .* lower training.learning_rate") as raised:
        finetune(model, sources, out, **settings)
    assert len(str(raised.value).splitlines()) == 1
    checkpoints = Checkpoints(out / "checkpoints", 2)
    last = checkpoints.latest_step
    checkpoints.close()
    assert 1 <= last < 12 and f"the last good checkpoint is that of step {last};" in str(raised.value)
    assert not (out / "model").exists() and not (out / "result.json").exists()


@pytest.fixture
def refused(done, model, sources, monkeypatch):
    """Resumes the finished run with changed settings, which is refused and leaves the folder unchanged."""
    monkeypatch.setattr(recover, "measure", lambda *_: None)  # not needed here, and takes most of the time

    def refused(says, model=model, **settings):
        before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
        with pytest.raises(ValueError, match=says) as raised:
            finetune(model, sources, done.out, **(tiny_training.TAUGHT | settings))
        assert len(str(raised.value).splitlines()) == 1
        assert {path: path.stat().st_mtime_ns for path in done.out.rglob("*")} == before

    return refused


@pytest.fixture
def other(tmp_path):
    return tiny_model.write_model(tmp_path / "other", params=tiny_model.random_params(seed=1))


@pytest.mark.parametrize(
    ("setting", "value", "started_with"),
    [
        ("training.learning_rate", 0.1, 0.003),
        ("policy.spec", "topk:2", "topk:3"),
        ("finetune.train", "lora", "all"),
        ("objective.hidden", 1.0, 0.0),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(refused, setting, value, started_with):
    refused(rf"{setting} = {value!r}: the run in .* was started with {started_with!r}; give", **{setting: value})


def test_another_model_in_the_same_folder_is_refused(refused, other):
    refused(r"model.path = '.*other': the run in .* was started with '.*tiny'", other)


@contextlib.contextmanager
def replaced(path, data):
    """Gives a file other contents until the block ends."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_another_model_or_text_of_the_same_name_is_refused(refused, model, sources, other):
    differs = r": its contents changed since the run in .* was started; restore those files, or give another"
    with replaced(model / "model.safetensors", (other / "model.safetensors").read_bytes()):
        refused("model.path" + differs)
    changed = sources / "train" / "cmd.py"
    with replaced(changed, changed.read_bytes() + b"# the end\n"):
        refused("text.sources" + differs)
