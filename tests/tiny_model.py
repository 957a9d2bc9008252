"""A model of a few thousand random weights, with the structure of real ones, for all tests."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from moe_jax.checkpoint.huggingface import write_checkpoint
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig
from moe_jax.kernels import chooser
from moe_jax.model.decoder import Decoder, split
from moe_jax.text.tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer

ARCHITECTURE = Architecture(
    DecoderConfig(vocab_size=512, d_model=64, num_layers=3, num_dense_layers=1, dense_hidden=96, max_context=32),
    AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    MoEConfig(num_experts=16, k=8, expert_hidden=24, num_shared_experts=1),
)
KERNELS = chooser.resolve("cpu", ARCHITECTURE, "float32")
TEXT = "The quick brown fox jumps over the lazy dog; a walk through the woods, said the fox, is never lazy. " * 3


def changed(architecture=ARCHITECTURE, **sections):
    """The architecture with some settings changed: `changed(moe={"k": 2})`."""
    replaced = {name: dataclasses.replace(getattr(architecture, name), **new) for name, new in sections.items()}
    return dataclasses.replace(architecture, **replaced)


def layers_of(moe, num_layers):
    """An architecture with only MoE layers, for tests that need nothing else."""
    return Architecture(DecoderConfig(num_layers=num_layers, num_dense_layers=0), AttentionConfig(), moe)


def random_params(architecture=ARCHITECTURE, seed=0):
    """Weights that keep activations near one, with norms and biases that matter."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: split(Decoder(architecture, nnx.Rngs(0))))

    def fill(path, leaf):
        name, shape = path[-1].key, leaf.shape
        x = random.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            return 1 + x / 10
        if "bias" in name:
            return x / 10
        inputs = architecture.decoder.d_model
        if name.startswith(("down", "output")):
            inputs = np.prod(shape[3 if "_LE" in name else 2 :])
        return x * np.float32(inputs**-0.5)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def tokenizer():
    """A tokenizer trained on a sentence: 320 tokens, of which 257 are the bytes and `<|endoftext|>`."""
    words = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ake", "ing", "ound", "ly")]
    return train_tokenizer([TEXT, " ".join(words)], 320)


def write_model(folder, architecture=ARCHITECTURE, params=None, **options):
    """Writes the model and its tokenizer in Hugging Face layout."""
    params = random_params(architecture) if params is None else params
    token_ids = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    write_checkpoint(folder, architecture, params, **{"dtype": "float32", "token_ids": token_ids, **options})
    save_tokenizer(tokenizer(), folder, architecture.decoder.max_context)
    return folder
