"""Makes the golden files: random checkpoints of every family, tokens, and the logits that transformers gives for them.

    pip install -r requirements-peers.txt && PYTHONPATH=. python tests/golden/make.py [NAME ...]

A file is a safetensors file with the tensors of a checkpoint as transformers writes them, `golden.tokens`,
`golden.logits` and, in its metadata, the text of config.json.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.family_variants import GOLDEN, VARIANTS, write
from tests.peers import peer

FOLDER = pathlib.Path(__file__).parent
SHAPE = 2, 24  # rows and positions
# Fields of config.json other than ours.
SAID_OTHERWISE = {
    "kimi_k2": {"model_type": "deepseek_v3"},  # it has no class of its own; this one is used
    "qwen2_moe_every_second": {"mlp_only_layers": [], "decoder_sparse_step": 2},
}


def make(name: str) -> None:
    """Picks tokens for which no choice of an expert is close."""
    model_type, architecture = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        write(path / "ours", VARIANTS[name], seed=1)
        fields = json.loads((path / "ours" / "config.json").read_text())
        (path / "ours" / "config.json").write_text(json.dumps(fields | SAID_OTHERWISE.get(name, {})))
        model = peer.load_model(transformers, path / "ours")
        tokens_BT = peer.clear_tokens(model, architecture, SHAPE)
        logits_BTV, _ = peer.logits(model, tokens_BT, np.ones(SHAPE, bool), architecture.moe)
        model.to(torch.bfloat16).save_pretrained(path / "theirs")  # bfloat16 represents the weights exactly
        tensors = safetensors.numpy.load_file(path / "theirs" / "model.safetensors")
        config = json.loads((path / "theirs" / "config.json").read_text()) | {"model_type": model_type}
    tensors |= {"golden.tokens": tokens_BT, "golden.logits": logits_BTV}
    safetensors.numpy.save_file(tensors, FOLDER / f"{name}.safetensors", {"config": json.dumps(config)})


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for name in sys.argv[1:] or GOLDEN:
        make(name)
