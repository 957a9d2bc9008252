"""The shipped model: it is as described, and does what it was trained for."""

import csv
import pathlib

import numpy as np
import pytest

import moe_jax
from moe_jax.evaluation import likelihood
from moe_jax.evaluation.intervals import paired_ratio, ratio
from moe_jax.model.execution import Execution
from moe_jax.routing.policies.parse import parse
from moe_jax.text.held_out import load_held_out
from moe_jax.text.tokenizer import encode_documents
from tests import tiny_model

ROOT = pathlib.Path(__file__).parents[1]
DEMO = ROOT / "assets" / "demo"


@pytest.fixture(scope="module")
def model():
    return moe_jax.load(DEMO, dtype="float32")


def test_it_is_small_and_fine_grained(model):
    decoder, moe = model.architecture.decoder, model.architecture.moe
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 32e6
    assert decoder.num_layers >= 6 and (moe.num_experts, moe.k, moe.num_shared_experts) == (64, 8, 1)
    assert (DEMO / "MODEL_CARD.md").exists() and (DEMO / "training_curve.png").exists()


def test_it_compresses_held_out_text_better_than_xz_and_worse_with_fewer_experts(model):
    documents = load_held_out(ROOT / "assets" / "text")[::16]
    tokens = encode_documents(model.tokenizer, documents)
    execution = Execution(model.architecture, 8, tiny_model.KERNELS)
    settings = {"context": model.architecture.decoder.max_context, "batch_size": 8}
    sizes = np.array([len(document.text.encode()) for document in documents])
    compared = [parse("topk:2"), parse("model")]
    few, full = likelihood.score_documents(model.params, tokens, compared, execution, **settings)
    xz = likelihood.xz_bits_per_byte([document.text.encode() for document in documents])
    assert ratio(full.bits_J, sizes).value < 0.85 * xz
    assert paired_ratio(few.bits_J, full.bits_J).ci95[0] > 0.02


def test_measured_bits_are_those_of_this_model(model):
    """`benchmarks/results/evaluate_demo` was measured on these weights; some of its documents are scored again."""
    with open(ROOT / "benchmarks" / "results" / "evaluate_demo" / "documents.csv", newline="") as file:
        lines = list(csv.DictReader(file))[::40]
    documents = load_held_out(ROOT / "assets" / "text")[::40]
    assert [line["name"] for line in lines] == [document.name for document in documents]
    scored = likelihood.score_documents(
        model.params,
        encode_documents(model.tokenizer, documents),
        [parse("topk:8"), parse("topk:1")],
        Execution(model.architecture, 8, tiny_model.KERNELS),
        **{"context": model.architecture.decoder.max_context, "batch_size": 8},
    )
    for spec, one in zip(("topk:8", "topk:1"), scored):
        np.testing.assert_allclose(one.bits_J, [float(line[spec]) for line in lines], rtol=1e-4)
