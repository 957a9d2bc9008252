"""launch/prune.py on a tiny model and real text: its rows, models and error messages, and resuming."""

import json
import pathlib
import re

import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint, conversion
from moe_jax.engine.request import execution_of
from moe_jax.evaluation.likelihood import score_documents
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.study import prune as study
from moe_jax.text.held_out import half, load_held_out
from moe_jax.text.tokenizer import encode_documents
from tests import launcher_module, tiny_model, tiny_training
from tests.faults import launched

EXPORTED = "reap_8", "random_12_1", "reap_across_layers_12"
SMALL = {
    "prune.methods": '("random", "odd", "reap")',
    "prune.keep": "(12, 8)",
    "prune.draws": 2,
    "prune.tokens": 200,
    "prune.export": json.dumps(EXPORTED),
    "evaluation.half": "odd",
}
NAMES = [
    "model",
    *("random_12", "random_12_0", "random_12_1", "reap_12", "reap_across_layers_12"),
    *("random_8", "random_8_0", "random_8_1", "odd_8", "reap_8", "reap_across_layers_8"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tiny_training.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def settings(sources, tmp_path_factory):
    folder = tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")
    text = {"text.sources": repr((str(sources / "train"),)), "text.held_out": sources / "held_out"}
    return {**SMALL, "model.path": folder, **text}


def run(settings, out):
    out.mkdir(exist_ok=True)
    return launcher_module.run_main("prune", settings, out)


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """A run interrupted after three models and started again, what it printed, and how many models it measured."""
    out, measured = tmp_path_factory.mktemp("out") / "prune", []

    def counted(*arguments, **options):
        if len(measured) == 3:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(arguments)
        return score_documents(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "score_documents", counted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, out)
        assert [path.name for path in out.iterdir()] == ["parts"]
        printed = run(settings, out)
    return out, printed, len(measured) - 1


def test_every_model_has_a_row_and_is_measured_once(done, settings):
    out, printed, measured = done
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == NAMES and all(f"| `{name}` |" in printed for name in NAMES)
    assert measured == len(NAMES) - 2  # the means of random ones are not models
    assert {path.name for path in out.iterdir()} == {"result.json", "config.gin", *EXPORTED}
    figures = {row["policy"]: row["figures"] for row in rows}
    bits = {name: one["bits_per_byte"]["value"] for name, one in figures.items()}
    draws = [bits["random_8_0"], bits["random_8_1"]]
    assert bits["random_8"] == pytest.approx(np.mean(draws))
    assert figures["random_8"]["bits_per_byte"]["range"] == pytest.approx([min(draws), max(draws)])
    over = figures["reap_8"]["bits_per_byte_over_random"]["value"]
    assert over == pytest.approx(bits["reap_8"] / bits["random_8"] - 1)
    assert figures["reap_8"]["bits_per_byte_increase"]["value"] == pytest.approx(bits["reap_8"] / bits["model"] - 1)
    sizes = {row["policy"]: row["experts_of_layers"] for row in rows}
    assert sizes["model"] == [16, 16] and sizes["odd_8"] == [8, 8] and sum(sizes["reap_across_layers_12"]) == 24
    expert = 3 * 24 * 64 + 65  # with its row of the router, and its bias
    assert figures["model"]["parameters"]["value"] - figures["odd_8"]["parameters"]["value"] == 2 * 8 * expert
    assert figures["model"]["calibration"]["value"] == 200


def test_the_written_models_are_those_that_were_measured(done, settings):
    out, _, _ = done
    rows = {row["policy"]: row["figures"] for row in json.loads((out / "result.json").read_text())["rows"]}
    documents = half(load_held_out(settings["text.held_out"]), "odd")
    for name in EXPORTED:
        model = moe_jax.load(out / name)
        tokens = encode_documents(checkpoint.open(out / name).tokenizer, documents)
        options = {"context": 32, "batch_size": 16}
        [scored] = score_documents(model.params, tokens, [MODEL_OWN], execution_of(model.architecture), **options)
        bits = scored.bits_J.sum() / sum(document.num_bytes for document in documents)
        assert rows[name]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)


def test_a_model_stored_in_fp8_is_pruned_in_the_wide_dtype(settings, tmp_path):
    """With the figures of the model that its weights are, dequantised."""
    conversion.convert(settings["model.path"], tmp_path / "fp8", expert_dtype="float8_e4m3fn")
    conversion.convert(tmp_path / "fp8", tmp_path / "wide", dtype="float32")
    one = {
        "prune.methods": '("reap",)',
        "prune.across_layers": "()",
        "prune.keep": "(8,)",
        "prune.export": '("reap_8",)',
    }
    for name in ("fp8", "wide"):
        run({**settings, **one, "model.path": tmp_path / name, "model.dtype": "float32"}, tmp_path / f"out_{name}")
    fp8, wide = (json.loads((tmp_path / f"out_{name}" / "result.json").read_text())["rows"] for name in ("fp8", "wide"))
    assert fp8 == wide
    assert moe_jax.load(tmp_path / "out_fp8" / "reap_8").architecture.moe.num_experts == 8


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("prune.keep", "(17,)", "prune.keep = 17: expected at most the 16 experts"),
        ("prune.keep", "(7, 8)", "prune.keep = 7: expected room for the model's k = 8"),
        ("prune.keep", "(12,)", "prune.methods has 'odd', which keeps half of the experts: expected 8 in prune.keep"),
        ("prune.methods", '("reep",)', "prune.methods = ('reep',): expected some of random, odd"),
        ("model.expert_dtype", "int8", "model.expert_dtype = 'int8': expected auto or model"),
        ("policy.k_max", 4, "policy.k_max = 4: expected 0, a pruned model runs with the model's own k"),
        ("prune.export", '("reap_9",)', "prune.export = 'reap_9': expected one of random_12_0"),
        ("model.path", "nowhere", "nowhere"),
        ("moe.num_experts", "32", "moe.num_experts = 32: expected the model's own, 16"),
    ],
)
def test_refusals(settings, tmp_path, setting, value, says):
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        run({**settings, setting: value}, tmp_path / "out")
    assert "\n" not in str(refusal.value) and not any((tmp_path / "out").iterdir())


@pytest.mark.processes
def test_a_refusal_is_one_line_with_status_2(settings, tmp_path):
    flags = [f"--set={name}={value}" for name, value in (settings | {"prune.keep": "(17,)"}).items()]
    ended = launched.run("prune", *flags, "--out=out", folder=tmp_path)
    assert launched.not_refused(ended, r"prune.keep = 17: expected at most the 16 experts") == ""
    assert launched.entries(tmp_path) == set()


def test_the_config_of_the_demo_asks_for_what_the_demo_can_have():
    from moe_jax.config import gin
    from moe_jax.study import pruning

    root = pathlib.Path(__file__).parents[2]
    config = gin.read_config(root / "configs" / "prune_demo.gin")
    assert len(pruning.choices(config.prune, checkpoint.open(root / "assets" / "demo").architecture)) == 34
