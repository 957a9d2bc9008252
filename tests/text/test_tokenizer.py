"""Any text is decoded unchanged, and other tools read the saved files."""

import json
import pathlib
import sysconfig

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.text import tokenizer as tokenizer_module
from moe_jax.text.corpus import collect
from moe_jax.text.documents import Document
from moe_jax.text.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    TextStream,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from tests import chained_model

STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))
VOCAB_SIZE = 1024

any_text = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from(" \t\r\n\0\x0b\x0c\x1b\x7f\x85\u200b\u2028\ufeff\ufffda_1.'")),
    st.text(alphabet=st.sampled_from("é日本語👩‍👩‍👧🏽🇦🇧ÅÅ")),
    st.lists(st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " ", "def f(x):\n    ", "return x\r\n"])).map("".join),
)


@pytest.fixture(scope="module")
def documents():
    return collect([str(STDLIB / "json"), str(STDLIB / "html"), str(STDLIB / "email")], ()).documents


@pytest.fixture(scope="module")
def tokenizer(documents):
    # on a busy machine, threads that wait for each other at every merge take minutes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        return train_tokenizer((document.text for document in documents), VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder, max_context=1024)
    return folder


def test_training_is_deterministic_on_any_number_of_threads(documents, monkeypatch):
    trained = []
    for parallel in ("true", "false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        trained.append(train_tokenizer((document.text for document in documents[:10]), 400).to_str())
    assert trained[0] == trained[1] == trained[2]


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.id_to_token(END_OF_TEXT_ID) == END_OF_TEXT
    with pytest.raises(ValueError, match=r"text.vocab_size = 4000: the training text has pairs for \d+ tokens only"):
        train_tokenizer(["a b c"], 4000)


@hypothesis.given(any_text)
@hypothesis.settings(deadline=None, max_examples=300)
def test_any_text_is_decoded_unchanged(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == END_OF_TEXT_ID
    assert END_OF_TEXT_ID not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_indentation_takes_few_tokens(tokenizer, documents):
    layout = "\n\n    def f(self):\n        return 0\n"
    assert len(tokenizer.encode(layout).tokens) <= 12
    ids = encode_documents(tokenizer, documents)
    assert sum(len(document.text.encode()) for document in documents) / sum(map(len, ids)) > 2.8


def test_digits_are_split_in_short_groups(tokenizer):
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("x=1234567890123")]
    assert pieces == ["x", "=", "123", "456", "789", "012", "3"]


def test_documents_are_encoded_alone_and_in_order(tokenizer, documents, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_ENCODE_AT_ONCE", 7)
    some = [*documents[:20], Document("here", "empty", ""), Document("here", "special", f"a{END_OF_TEXT}b")]
    arrays = encode_documents(tokenizer, some)
    assert [array.dtype for array in arrays] == [np.int32] * len(some)
    for document, array in zip(some, arrays, strict=True):
        assert array.tolist() == tokenizer.encode(document.text).ids
    assert arrays[-2].tolist() == [END_OF_TEXT_ID]
    assert np.count_nonzero(arrays[-1] == END_OF_TEXT_ID) == 1


def test_saved_tokenizer_loads_the_same(tokenizer, folder):
    text = f"class A:\n    x = {END_OF_TEXT!r}\n"
    for path in (folder, folder / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.to_str() == tokenizer.to_str()
        assert loaded.encode(text).ids == tokenizer.encode(text).ids
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 1024
    assert settings["bos_token"] == settings["eos_token"] == END_OF_TEXT


def test_special_tokens_of_other_tokenizers_stay_special(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(f"a{END_OF_TEXT}").ids[-1] == END_OF_TEXT_ID
    in_document = encode_documents(loaded, [Document("here", "special", f"a{END_OF_TEXT}")])[0]
    assert END_OF_TEXT_ID not in in_document[1:]
    assert loaded.encode(f"a{END_OF_TEXT}").ids[-1] == END_OF_TEXT_ID


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"'])
def test_damaged_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_tokenizer_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is missing: a model's folder holds the tokenizer"):
            load_tokenizer(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"split_special_tokens"'])
def test_damaged_settings_are_refused(content, tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config.json is damaged"):
        load_tokenizer(tmp_path)


# streams of text


@hypothesis.given(any_text)
@hypothesis.settings(deadline=None, max_examples=150)
def test_stream_adds_up_to_the_text(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(number) for number in tokenizer.encode(text).ids]
    assert "".join(pieces) + stream.flush() == text
    # a piece ends in U+FFFD only if the text has that character itself, and then only once more text follows
    assert not any(piece.endswith("\ufffd") for piece in pieces)


@hypothesis.given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
@hypothesis.settings(deadline=None, max_examples=150)
def test_stream_of_any_tokens_adds_up_to_their_text(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.push(number) for number in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=True)


def test_stream_holds_back_half_a_character(tokenizer):
    ids = tokenizer.encode("a👩b").ids
    assert len(ids) > 4  # the emoji is not a token
    stream = TextStream(tokenizer)
    assert [piece for piece in map(stream.push, ids) if piece] == ["a", "👩", "b"]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids[:4])) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


PIECES_OF_WORDS = chained_model.sentencepiece_like()


@pytest.mark.parametrize("before", ["ha", "ha be c", "☃", "", "</s>", "ha" * 40 + "</s>" * 40, "☃" * 30])
@pytest.mark.parametrize("after", [" be c", " ", "  c", "ab", "é ☃", "</s> be"])
def test_prompt_and_stream_add_up_to_the_text(before, after):
    """The decoder strips a leading space of a text, but must not strip one of a continuation."""
    ids = PIECES_OF_WORDS.encode(before).ids
    both = [*ids, *PIECES_OF_WORDS.encode(f"h{after}", add_special_tokens=False).ids[2:]]
    stream = TextStream(PIECES_OF_WORDS, ids)
    pieces = [stream.push(number) for number in both[len(ids) :]]
    assert PIECES_OF_WORDS.decode(ids) + "".join(pieces) + stream.flush() == PIECES_OF_WORDS.decode(both)


@hypothesis.given(any_text, any_text)
@hypothesis.settings(deadline=None, max_examples=100)
def test_any_prompt_and_stream_add_up(tokenizer, before, after):
    ids = tokenizer.encode(before).ids
    stream = TextStream(tokenizer, ids)
    pieces = [stream.push(number) for number in tokenizer.encode(after, add_special_tokens=False).ids]
    assert "".join(pieces) + stream.flush() == after


@pytest.mark.parametrize("make", [chained_model.byte_level, chained_model.sentencepiece_like])
def test_a_character_may_begin_in_the_prompt_and_end_after_it(make):
    tokenizer = make()
    ids = tokenizer.encode("a☃b", add_special_tokens=False).ids
    for cut in range(1, len(ids)):
        stream = TextStream(tokenizer, ids[:cut])
        text = "".join(map(stream.push, ids[cut:])) + stream.flush()
        whole = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert whole + text == tokenizer.decode(ids)


def test_a_long_prompt_is_decoded_from_its_end():
    class Counting:
        longest = 0

        def decode(self, ids, skip_special_tokens):
            self.longest = max(self.longest, len(ids))
            return PIECES_OF_WORDS.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    stream = TextStream(counting, PIECES_OF_WORDS.encode("be c " * 1000).ids)
    assert stream.push(PIECES_OF_WORDS.token_to_id("▁be")) == " be"
    assert counting.longest < 40


@pytest.mark.peers
def test_transformers_reads_it(folder, tokenizer, documents):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    assert loaded.model_max_length == 1024
    assert loaded.bos_token_id == loaded.eos_token_id == END_OF_TEXT_ID
    for text in [*(document.text for document in documents[:10]), f"a {END_OF_TEXT} b", "", "é👩\r\n"]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
