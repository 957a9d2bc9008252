"""The shipped model: what it is said to be, and that it does what it was trained for."""

import keyword
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import moe_jax
from moe_jax.evaluation import likelihood
from moe_jax.model.decoder import Execution
from moe_jax.routing.policies.parse import parse
from moe_jax.text.corpus import load_held_out
from moe_jax.text.tokenizer import encode_documents

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


def test_the_first_command_of_the_readme_continues_python():
    launch = [sys.executable, str(ROOT / "launch" / "infer.py"), "--config", str(ROOT / "configs" / "infer_demo.gin")]
    done = subprocess.run(launch, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    prompt = "import numpy as np\n\n\ndef normalize(x, axis=None):\n"
    assert done.stdout.startswith(prompt) and "8.00 experts per token" in done.stdout
    continued = done.stdout.split("np.asarray(x)\n", 1)[1].split("\nload ")[0]
    words = re.findall(r"[a-z_]+", continued)
    indented = [line for line in continued.splitlines() if line.startswith("    ")]
    assert sum(map(keyword.iskeyword, words)) >= 5 and len(indented) >= 5, continued


def test_it_compresses_held_out_text_better_than_xz_and_worse_with_fewer_experts(model):
    documents = load_held_out(ROOT / "assets" / "text")[::16]
    tokens = encode_documents(model.tokenizer, documents)
    execution = Execution(model.architecture, 8, "blocked")
    settings = {"context": model.architecture.decoder.max_context, "batch_size": 8}
    sizes = np.array([len(document.text.encode()) for document in documents])
    few, full = (
        likelihood.score(model.params, tokens, parse(spec), execution, **settings).bits for spec in ("topk:2", "model")
    )
    xz = likelihood.xz_bits_per_byte([document.text.encode() for document in documents])
    assert likelihood.bits_per_byte(full, sizes).value < 0.85 * xz
    assert likelihood.paired_ratio(few, full).ci95[0] > 0.02
