"""A tiny Qwen3-MoE whose greedy continuation is known, and tokenizers like those of published models."""

import itertools
import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moe_jax.checkpoint import huggingface
from moe_jax.config.architecture import Architecture, AttentionConfig, DecoderConfig, MoEConfig

VOCAB = 300
ARCHITECTURE = Architecture(
    DecoderConfig(vocab_size=VOCAB, d_model=32, num_layers=2, num_dense_layers=0, tie_embeddings=False, max_context=64),
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope_fraction=1.0),
    MoEConfig(4, 2, 8, num_shared_experts=0, score="softmax", selection_bias=False),
)


def byte_level():
    """One token for each byte, in the order of its characters, then three special tokens: 256, 257 and 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={one: number for number, one in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<s>"])
    return made


def sentencepiece_like():
    """Like Mixtral's: words begin with U+2581, the decoder strips one leading space, other characters are bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeh"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("▁", "b"), ("▁b", "e"), ("▁", "c")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def params(chain=(), gain=0.0):
    """Weights for which chain[i + 1] is the best continuation of chain[i]: the residual stream is almost the embedding.

    Args:
        chain: token ids, each at most once before another one.
        gain: scale of what attention and experts add to the residual stream; 0: nothing.
    """
    random = np.random.default_rng(0)
    flat = {
        rule.parameter: random.standard_normal(rule.shape(ARCHITECTURE)).astype(np.float32) * np.float32(0.2)
        for rule in huggingface.family_of({"model_type": "qwen3_moe"}).rules(ARCHITECTURE)
    }
    for name, x in flat.items():
        if "norm" in name:
            x[:] = 1
        if "output" in name or "down" in name:
            x *= np.float32(gain)
    embedding_VD = flat["embedding_VD"]
    embedding_VD /= np.linalg.norm(embedding_VD, axis=1, keepdims=True)
    flat["head_VD"] = np.zeros_like(embedding_VD)
    for before, after in itertools.pairwise(chain):
        flat["head_VD"][after] += embedding_VD[before]
    return huggingface.nested(flat)


def write(folder, chain=(), tokenizer=None, tokenizer_config=None, gain=0.0, **options):
    """Writes a folder of such a model with a tokenizer; `options` are those of `write_checkpoint`."""
    settings = {"model_type": "qwen3_moe", "dtype": "float32", "token_ids": {"eos_token_id": 256}, **options}
    huggingface.write_checkpoint(folder, ARCHITECTURE, params(chain, gain), **settings)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    named = named if tokenizer_config is None else tokenizer_config
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
