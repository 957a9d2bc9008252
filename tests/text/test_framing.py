"""Every document begins and ends once, whatever tokens a tokenizer or a template adds."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from moe_jax.text import chat
from moe_jax.text.batches import pack
from moe_jax.text.documents import Document
from moe_jax.text.framing import frame_documents, outer_ids
from moe_jax.text.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, encode_documents
from tests import tiny_model
from tests.chat_templates import CHATML, INST

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[gMASK]"]
MESSAGES = [{"role": "user", "content": "The fox?"}, {"role": "assistant", "content": "Lazy."}]
FRAMES = {
    "nothing": "$A",
    "begin": "<s> $A",
    "both": "<s> $A </s>",
    "end": "$A </s>",
    "another": "[gMASK] $A",
    "end of text": f"{END_OF_TEXT} $A",
}


def tokenizer_that_adds(frame):
    """The tiny model's tokenizer, with special tokens of other models and other tokens around a text."""
    tokenizer = tokenizers.Tokenizer.from_str(tiny_model.tokenizer().to_str())
    tokenizer.add_special_tokens(SPECIAL)
    ids = [(token, tokenizer.token_to_id(token)) for token in (*SPECIAL, END_OF_TEXT)]
    tokenizer.post_processor = processors.TemplateProcessing(single=FRAMES[frame], pair="$A $B", special_tokens=ids)
    return tokenizer


def spelled(tokenizer, arrays):
    assert all(array.dtype == np.int32 for array in arrays)
    return [tokenizer.decode(array, skip_special_tokens=False) for array in arrays]


def plain(*texts):
    return [Document("here", str(number), text) for number, text in enumerate(texts)]


def meant(*texts):
    return [Document("here", str(number), text, special_tokens=True) for number, text in enumerate(texts)]


# special tokens written in the text


@pytest.mark.parametrize("frame", FRAMES)
def test_special_tokens_are_encoded_only_where_intended(frame):
    tokenizer = tokenizer_that_adds(frame)
    tokenizer.encode_special_tokens = True
    text = chat.render_conversation(CHATML, {}, MESSAGES)
    unmeant, special = encode_documents(tokenizer, [*plain(text), *meant(text)])
    markers = [tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert np.isin(special, markers).sum() == 4 and not np.isin(unmeant, markers).any()
    assert tokenizer.decode(unmeant) == text
    assert tokenizer.encode_special_tokens


def test_kinds_of_documents_stay_in_order(monkeypatch):
    monkeypatch.setattr("moe_jax.text.tokenizer._ENCODE_AT_ONCE", 2)
    tokenizer = tokenizer_that_adds("begin")
    documents = [one for n in range(5) for one in (*plain(f"a{n}</s>"), *meant(f"<s>b{n}</s>", f"c{n}"))]
    expected = [text for n in range(5) for text in (f"<s>a{n}</s>", f"<s>b{n}</s>", f"<s>c{n}")]
    assert spelled(tokenizer, encode_documents(tokenizer, documents)) == expected


def test_the_first_token_of_a_conversation_is_not_repeated():
    tokenizer = tokenizer_that_adds("end of text")
    special_tokens = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    text = chat.render_conversation(INST, special_tokens, MESSAGES)
    assert spelled(tokenizer, encode_documents(tokenizer, meant(text))) == [text]


# frames


@pytest.mark.parametrize("frame", ["nothing", "begin", "both", "end"])
def test_each_document_begins_and_ends_once(frame):
    tokenizer = tokenizer_that_adds(frame)
    begin_id, end_id = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    documents = [
        *plain("The fox", "", "a </s>\n", "<s>"),
        *meant("The fox", "<s>The fox", "<s>The fox</s>", "The</s> fox</s>\n", "</s>", "The fox\n"),
    ]
    arrays = frame_documents(tokenizer, documents, begin_id, end_id)
    assert spelled(tokenizer, arrays) == [
        *("<s>The fox</s>", "<s></s>", "<s>a </s>\n</s>", "<s><s></s>"),
        *(["<s>The fox</s>"] * 3),
        *("<s>The</s> fox</s>", "<s></s>", "<s>The fox\n</s>"),
    ]
    for array in [*arrays[:7], *arrays[8:]]:
        assert (array == begin_id).sum() == (array == end_id).sum() == 1
    packed = pack(arrays, 16, begin_id)
    assert packed.num_tokens == sum(map(len, arrays))


@pytest.mark.parametrize("frame", ["nothing", "end of text"])
def test_one_token_for_both_only_begins(frame):
    tokenizer = tokenizer_that_adds(frame)
    documents = [*plain("The fox", ""), *meant("The fox", f"{END_OF_TEXT}The{END_OF_TEXT}fox{END_OF_TEXT}\n")]
    arrays = frame_documents(tokenizer, documents, END_OF_TEXT_ID, END_OF_TEXT_ID)
    expected = ["<|endoftext|>The fox", "<|endoftext|>", "<|endoftext|>The fox", "<|endoftext|>The<|endoftext|>fox"]
    assert spelled(tokenizer, arrays) == expected
    assert pack(arrays, 16, END_OF_TEXT_ID).tokens[-1] == END_OF_TEXT_ID


def test_another_token_before_a_text_stays():
    tokenizer = tokenizer_that_adds("another")
    arrays = frame_documents(tokenizer, [*plain("a"), *meant("[gMASK]b")], END_OF_TEXT_ID, END_OF_TEXT_ID)
    assert spelled(tokenizer, arrays) == ["<|endoftext|>[gMASK]a", "<|endoftext|>[gMASK]b"]


def test_our_tokenizer_frames_with_its_own_tokens():
    documents = [*plain("The fox", "", f"a{END_OF_TEXT}b", END_OF_TEXT), *meant("The fox", f"a{END_OF_TEXT}b")]
    arrays = frame_documents(tiny_model.tokenizer(), documents, END_OF_TEXT_ID, END_OF_TEXT_ID)
    for array, expected in zip(arrays, encode_documents(tiny_model.tokenizer(), documents), strict=True):
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, expected)
    assert frame_documents(tiny_model.tokenizer(), [], END_OF_TEXT_ID, END_OF_TEXT_ID) == []


# where the ids come from


@pytest.mark.parametrize(
    ("named", "token_ids", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": {"content": "</s>"}}, {"eos_token_id": 7}, ("<s>", "</s>")),
        ({"bos_token": None, "eos_token": "</s>"}, {"bos_token_id": 7}, ("</s>", "</s>")),
        ({"bos_token": "<s>"}, {"eos_token_id": [7, 8]}, ("<s>", 7)),
        ({"bos_token": "unknown"}, {"bos_token_id": 9, "eos_token_id": [7, 8]}, (7, 7)),
        ({}, {"bos_token_id": 9, "eos_token_id": 7}, (7, 7)),
        (None, {"eos_token_id": 0}, (0, 0)),
    ],
)
def test_outer_ids(named, token_ids, expected, tmp_path):
    tokenizer = tokenizer_that_adds("nothing")
    if named is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    expected = tuple(one if isinstance(one, int) else tokenizer.token_to_id(one) for one in expected)
    assert outer_ids(tmp_path, tokenizer, token_ids) == expected


@pytest.mark.parametrize("token_ids", [{}, {"bos_token_id": 9}, {"eos_token_id": []}])
def test_models_without_outer_ids_are_refused(token_ids, tmp_path):
    with pytest.raises(ValueError, match="names no token that begins or ends a text: expected bos_token or eos_token"):
        outer_ids(tmp_path, tokenizer_that_adds("nothing"), token_ids)
