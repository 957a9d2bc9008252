import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import api, checkpoint
from moe_jax.config.schema import Config
from moe_jax.engine.request import execution_of
from moe_jax.model import parameters
from moe_jax.routing import policies
from moe_jax.routing.policies.parse import MODEL_OWN
from moe_jax.routing.policies.schedule import TopK
from tests import chained_model, tiny_model

TOKENS_BT = np.random.default_rng(0).integers(0, 512, (3, 14), dtype=np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return moe_jax.load(folder)


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_public_names_exist_and_importing_them_is_cheap():
    code = (
        "import sys, moe_jax, moe_jax.command, moe_jax.config.gin\n"
        "assert set(moe_jax.__all__) <= set(dir(moe_jax))\n"
        "assert moe_jax.read_config(None).policy.spec == 'model' and moe_jax.__version__[0].isdigit()\n"
        "assert not {'jax', 'flax', 'tokenizers'} & set(sys.modules), 'imported too early'\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
    assert moe_jax.Model is api.Model and moe_jax.load is api.load
    assert moe_jax.policies.parse("topk:3").parts == (TopK(3),)
    assert moe_jax.read_config(None) == Config()
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = moe_jax.lod


def test_logits_depend_on_neither_padding_nor_other_rows_nor_their_policies(model):
    policy = ["topk:2", moe_jax.policies.parse("topk:8"), None]
    logits_BTV = model.logits(TOKENS_BT, policy=policy)
    assert (logits_BTV.dtype, logits_BTV.shape) == (np.float32, (3, 14, 512))
    for row in range(3):
        assert_close(model.logits(TOKENS_BT[row : row + 1], policy=policy[row])[0], logits_BTV[row])
    assert_close(model.logits(TOKENS_BT[:, :7], policy=policy), logits_BTV[:, :7])
    assert np.abs(model.logits(TOKENS_BT[:1]) - logits_BTV[:1]).max() > 0.1


def test_logits_and_completions_agree(model):
    (completion,) = model.generate([TOKENS_BT[0, :9].tolist()], max_new_tokens=5, policy="topk:3")
    whole_BT = np.concatenate([TOKENS_BT[:1, :9], [completion.ids]], axis=1)
    logits_TV = model.logits(whole_BT, policy="topk:3")[0, 8:13]
    assert completion.ids == tuple(logits_TV.argmax(axis=1))
    expected = np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(5), list(completion.ids)]
    np.testing.assert_allclose(completion.log_probabilities, expected, rtol=1e-4, atol=1e-5)


def test_generate_passes_all_arguments_to_the_engine(model):
    settings = {"max_new_tokens": 8, "temperature": 2.0, "top_k": 400, "top_p": 0.99, "seed": 2}

    def made(**changed):
        (completion,) = model.generate(["The fox"], **{**settings, **changed})
        return completion

    pieces = []
    completion = made(on_text=lambda index, piece: pieces.append((index, piece)))
    assert "".join(piece for _, piece in pieces) == completion.text and {index for index, _ in pieces} == {0}
    assert made(seed=[2]) == completion and made(seed=3).ids != completion.ids
    assert made(temperature=0.0).ids == made(top_k=1).ids == made(top_p=1e-9).ids != completion.ids
    assert made(stop=completion.text[:2]).finish_reason == "stop"
    assert made(max_new_tokens=1).ids == completion.ids[:1]
    assert made(policy="topk:11", k_max=12, max_new_tokens=1).experts_per_token == 11


@pytest.mark.parametrize(
    ("tokens_BT", "settings", "expected"),
    [
        ([1, 2], {}, r"int64\[2\]: expected whole numbers \[B, T\]"),
        ([[]], {}, "expected whole numbers"),
        ([[1.0]], {}, "float64"),
        ([[512]], {}, "token 512: expected 0 to 511"),
        ([[3, -1]], {}, "token -1: expected 0 to 511"),
        ([[1] * 33], {}, "33 positions: expected at most the model's 32"),
        ([[1], [2]], {"policy": ["topk:1"]}, "one for each of the 2 rows, got 1"),
        ([[1]], {"policy": "topk:9"}, "expected 1 to 8 experts"),
        ([[1]], {"k_max": 17}, "to 16 experts"),
    ],
    ids=str,
)
def test_logits_refuse_bad_tokens(model, tokens_BT, settings, expected):
    with pytest.raises(ValueError, match=expected):
        model.logits(tokens_BT, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens = 0"),
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"stop": ("a", "")}, "sampling.stop"),
    ],
    ids=str,
)
def test_generate_refuses_bad_settings(model, settings, expected):
    with pytest.raises(ValueError, match=expected):
        model.generate(["The"], **{"max_new_tokens": 1, **settings})


def test_a_saved_model_loads_with_the_same_weights_tokenizer_and_end(model, folder, tmp_path):
    model.save(tmp_path / "copy")
    for name in os.listdir(folder):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes(), name
    with pytest.raises(ValueError, match="exists already"):
        model.save(tmp_path / "copy")
    model.save(tmp_path / "half", dtype="bfloat16")
    half = moe_jax.load(tmp_path / "half")
    assert half.params["moe"]["experts"]["down_LEDF"].dtype == "bfloat16"
    assert moe_jax.load(tmp_path / "half", dtype="float32").params["embedding_VD"].dtype == "float32"
    assert len(half.generate(["The"], max_new_tokens=1)[0].ids) == 1


def test_the_end_of_text_token_of_the_folder_ends_a_completion(model, folder, tmp_path):
    first, second = model.generate(["The"], max_new_tokens=2)[0].ids
    ending = pathlib.Path(shutil.copytree(folder, tmp_path / "ending"))
    for ids, length in ((first, 1), ([7, second], 1 + (first != second))):
        (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        (completion,) = moe_jax.load(ending).generate(["The"], max_new_tokens=5)
        assert (completion.finish_reason, len(completion.ids)) == ("end", length)


def test_a_model_without_a_tokenizer_gives_logits_alone(model, folder, tmp_path):
    bare = pathlib.Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    loaded = moe_jax.load(bare)
    assert_close(loaded.logits(TOKENS_BT), model.logits(TOKENS_BT))
    with pytest.raises(ValueError, match=r"no tokenizer\.json: expected one"):
        loaded.generate(["The"], max_new_tokens=1)
    with pytest.raises(ValueError, match="does not exist"):
        moe_jax.load(tmp_path / "nowhere")


def test_jax_uses_the_memory_into_which_weights_are_read(folder, monkeypatch):
    places = []

    def reading(*arguments):
        arrays = read(*arguments)
        places.append({array.ctypes.data for parts in arrays for array in parts})
        return arrays

    read = checkpoint.reading.read
    monkeypatch.setattr(checkpoint.reading, "read", reading)
    for dtype in ("bfloat16", "float32"):
        params = moe_jax.load(folder, dtype=dtype).params
        assert {array.unsafe_buffer_pointer() for array in jax.tree.leaves(params)} == places[-1]


def test_no_weight_in_half_precision_is_widened_or_copied_out_of_its_stack():
    """XLA on a CPU may turn a whole stack into float32 before the loop over layers."""
    architecture = tiny_model.changed(
        decoder={"num_layers": 9, "num_dense_layers": 1, "d_model": 256, "vocab_size": 512, "max_context": 128},
        moe={"expert_hidden": 256},
    )
    params = parameters.shapes(architecture, jnp.bfloat16)
    execution = execution_of(architecture)
    live = policies.settings([MODEL_OWN], architecture, execution.k_max)
    tokens_BT = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    compiled = api._logits.lower(params, tokens_BT, tokens_BT, live, execution=execution).compile()
    layer = parameters.count(architecture, lambda one: one.modules[:1] == ("moe",)) // 8
    assert layer > 3e6
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * layer


# a model with a known continuation


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<|im_end|>", "cdef", 5),
        (("Question:", "</s>", "<|im_end|>"), "cdef", 5),
        ("f<|im_end|>", "cde", 5),
        ("<|im_end|>gh", "cdef", 7),
        ("<s>", "cdefghij", 9),
    ],
)
def test_a_stop_string_may_be_a_special_token(tmp_path, stop, text, count):
    tokenizer = chained_model.byte_level()
    chain = [*tokenizer.encode("abcdef").ids, tokenizer.token_to_id("<|im_end|>"), *tokenizer.encode("ghijk").ids]
    model = moe_jax.load(chained_model.write(tmp_path / "model", chain, tokenizer))
    (completion,) = model.generate(["ab"], max_new_tokens=9, stop=stop)
    reason = "stop" if count < 9 else "length"
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert completion.ids == tuple(chain[2 : 2 + count])


@pytest.mark.parametrize(("prompt", "words"), [("ha", "▁be ▁c"), ("ha be", "▁c a"), ("☃h", "▁ ▁be")])
def test_prompt_and_completion_are_one_text(tmp_path, prompt, words):
    tokenizer = chained_model.sentencepiece_like()
    ids = tokenizer.encode(prompt).ids
    after = [*map(tokenizer.token_to_id, words.split()), tokenizer.token_to_id("</s>")]
    folder = chained_model.write(tmp_path / "model", [ids[-1], *after], tokenizer, token_ids={"eos_token_id": 2})
    pieces = []
    (completion,) = moe_jax.load(folder).generate(
        [prompt], max_new_tokens=3, on_text=lambda index, piece: pieces.append(piece)
    )
    assert completion.ids == tuple(after) and completion.finish_reason == "end"
    assert prompt + completion.text == tokenizer.decode([*ids, *after]) == prompt + "".join(pieces)
