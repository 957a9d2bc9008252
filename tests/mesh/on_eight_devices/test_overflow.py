"""Slots beyond a fixed capacity are counted in result.json; without one nothing is dropped, whatever the routing."""

import json

import numpy as np
import pytest

from tests import launcher_module, tiny_model, tiny_training

MESH = {"mesh.expert": 8, "mesh.dispatch": "all_to_all"}
PROMPT = "the quick brown fox jumps"
EXPERT, LAYERS = 3, 2


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory):
    """A model whose tokens all go to one expert."""
    architecture = tiny_model.changed(moe={"selection_bias": True})
    params = tiny_model.random_params(architecture)
    params["moe"]["router"]["bias_LE"][:, EXPERT] = 100
    return tiny_model.write_model(tmp_path_factory.mktemp("one_sided") / "model", architecture, params)


def run(name, folder, settings, *arguments):
    """The result of a launcher, and its output folder."""
    folder.mkdir()
    launcher_module.run_main(name, settings, folder, *arguments)
    return json.loads((folder / "result.json").read_text())


def infer(model, folder, **settings):
    """The ids of the completion, and the figures."""
    sampling = {"sampling.max_new_tokens": 6, "policy.spec": "topk:1", "policy.k_max": 1, "model.path": model}
    result = run("infer", folder, sampling | settings, f"--prompt={PROMPT}")
    return json.loads((folder / "completions.jsonl").read_text())["ids"], result["figures"]


def test_an_exact_dispatch_drops_nothing_though_all_tokens_go_to_one_expert(one_sided, tmp_path):
    expected, _ = infer(one_sided, tmp_path / "one")
    ids, figures = infer(one_sided, tmp_path / "eight", **MESH)
    assert ids == expected
    assert "overflow_slots" not in figures  # nothing can be dropped


def test_infer_counts_what_it_drops(one_sided, tmp_path):
    """Of the two positions of each device one fits, in the prefill; a decode step has one in all."""
    _, figures = infer(one_sided, tmp_path / "out", **MESH | {"mesh.capacity": 1.0})
    length = len(tiny_model.tokenizer().encode(PROMPT).ids)
    assert 8 <= length <= 16  # one bucket of 16 positions
    assert figures["overflow_slots"] == {"value": LAYERS * (length // 2), "unit": "slots"}


def test_training_counts_what_it_drops_and_judges_without_dropping(tmp_path):
    sources = tiny_training.write_sources(tmp_path)
    settings = {"training.steps": 6, "training.log_every": 4, "training.evaluate_every": 6, "mesh.data": 2}
    settings |= {
        "evaluation.policies": ("model",),
        "mesh.expert": 4,
        "mesh.dispatch": "all_to_all",
        "mesh.capacity": 0.5,
    }
    result = run(
        "train", tmp_path / "out", dict(one.split("=", 1) for one in tiny_training.overrides(sources, **settings))
    )
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    dropped = [line["overflow_slots"] for line in lines if "loss" in line]
    assert 0 < dropped[0] < dropped[1] == result["figures"]["overflow_slots"]["value"]
    judged = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["bits_per_byte"]
    assert np.isfinite(judged)


def test_evaluate_counts_by_policy_and_refuses_what_it_would_not_count(one_sided, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "fox.txt").write_text(tiny_model.TEXT * 4)
    settings = {"model.path": one_sided, "text.held_out": text, "evaluation.policies": '("topk:2", "topk:1")'}
    settings |= MESH | {"mesh.capacity": 1.0, "evaluation.completion_headers": 0}
    with pytest.raises(ValueError, match=r"mesh\.capacity = 1\.0: expected 0, or evaluation\.choice_questions=0"):
        run("evaluate", tmp_path / "refused", settings)
    result = run("evaluate", tmp_path / "out", settings | {"evaluation.choice_questions": 0})
    dropped = {row["policy"]: row["figures"]["overflow_slots"]["value"] for row in result["rows"]}
    assert dropped["topk:2"] > dropped["topk:1"] > 0
