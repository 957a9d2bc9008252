import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.engine.stopping import StoppingText
from tests import chained_model, tiny_model


def pieces(text, stop):
    """What a stream returns for a text, token by token: the pieces, and whether it stopped."""
    stream = StoppingText(tiny_model.tokenizer(), stop)
    shown = []
    for token in tiny_model.tokenizer().encode(text, add_special_tokens=False).ids:
        shown.append(stream.push(token))
        if stream.stopped:
            return shown, True
    shown.append(stream.flush())
    return shown, stream.stopped


@given(st.text("abé\n", max_size=20), st.lists(st.text("abé\n", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_complete_stop_string(text, stop):
    shown, stopped = pieces(text, stop)
    found = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert stopped == bool(found)
    assert "".join(shown) == text[: min(found)[1] if found else None]


@pytest.mark.parametrize("text", ["aab", "aaab", "abaab"])
def test_a_stop_string_that_begins_within_itself(text):
    assert "".join(pieces(text, ["aab"])[0]) == text[: -len("aab")]


def test_text_is_returned_as_soon_as_it_is_certain():
    stream = StoppingText(tiny_model.tokenizer(), ["xy\n", "yy"])
    ids = {character: tiny_model.tokenizer().token_to_id(character) for character in "axyz"}
    shown = [stream.push(ids[character]) for character in "axaxyzy"]
    assert shown == ["a", "", "xa", "", "", "xyz", ""]
    assert stream.flush() == "y" and not stream.stopped


# stop strings that name special tokens, which have no text

BYTES = chained_model.byte_level()
NAMES = {"<|endoftext|>": 256, "<|im_end|>": 257, "<s>": 258}


def shown(parts, stop, end_id=None):
    """What a stream returns for texts and special tokens by name, and whether it stopped; everything is pushed."""
    stream = StoppingText(BYTES, stop)
    text = ""
    for part in parts:
        for token in [NAMES[part]] if part in NAMES else BYTES.encode(part).ids:
            text += stream.push(token)
            if stream.stopped:
                return text, True
    return text + stream.flush(end_id), stream.stopped


@pytest.mark.parametrize(
    ("parts", "stop", "expected"),
    [
        (["cd", "<|im_end|>", "e"], ["<|im_end|>"], ("cd", True)),
        (["cd", "<s>", "e"], ["<|im_end|>"], ("cde", False)),
        (["cd<|im_end|>e"], ["<|im_end|>"], ("cd", True)),  # written as characters, not as the token
        (["cd", "<|im_end|>", "\ne"], ["<|im_end|>\n"], ("cd", True)),
        (["cd", "<|im_end|>", "e\n"], ["<|im_end|>\n"], ("cde\n", False)),
        (["c\n", "<|im_end|>", "e"], ["\n<|im_end|>"], ("c", True)),
        (["c\n", "<s>", "<|im_end|>", "e"], ["\n<|im_end|>"], ("c\ne", False)),  # another special token in between
        (["c", "<s>", "<|im_end|>", "e"], ["<s><|im_end|>"], ("c", True)),
        (["c", "<|im_end|>", "d", "<s>", "e"], ["<s>", "d<s>"], ("c", True)),  # the longest of those that end together
        (["c", "<s>", "d"], ["cd", "<|im_end|>"], ("", True)),  # in plain text
        (["ab", "<s>", "c"], ["</s>", "s"], ("abc", False)),  # a part of a name is not text
        (["a<|im", "<s>", "_end|>"], ["<|im_end|>x"], ("a<|im_end|>", False)),
        (["é", "<|im_end|>"], ["<|im_end|>", "Question:"], ("é", True)),
    ],
)
def test_a_stop_string_may_name_special_tokens(parts, stop, expected):
    assert shown(parts, stop) == expected


def test_what_may_begin_a_name_is_held_back_no_longer_than_needed():
    stream = StoppingText(BYTES, ["\n<|im_end|>", "<s>"])
    ids = [*BYTES.encode("a\n").ids, 258 - 2, *BYTES.encode("b\n").ids]
    assert [stream.push(token) for token in ids] == ["a", "", "\n", "b", ""]
    assert stream.flush() == "\n" and not stream.stopped


@pytest.mark.parametrize(
    ("stop", "expected"), [(["<|endoftext|>"], "c\n"), (["\n<|endoftext|>"], "c"), (["\n<|im_end|>"], "c\n")]
)
def test_the_end_of_text_may_be_the_end_of_a_stop_string(stop, expected):
    assert shown(["c\n"], stop, end_id=256) == (expected, False)


def test_stop_strings_begin_after_the_prompt():
    tokenizer = chained_model.sentencepiece_like()
    stream = StoppingText(tokenizer, ["ha be"], tokenizer.encode("ha").ids)
    be, c = (tokenizer.token_to_id(token) for token in ("▁be", "▁c"))
    assert [stream.push(be), stream.push(c)] == [" be", " c"] and not stream.stopped
    stream = StoppingText(tokenizer, [" c"], tokenizer.encode("ha").ids)
    assert [stream.push(be), stream.push(c)] == [" be", ""] and stream.stopped
