import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.engine.stopping import StoppingText
from tests import tiny_model


def pieces(text, stop):
    """What a stream shows of a text, token by token: the pieces, and whether it stopped."""
    stream = StoppingText(tiny_model.tokenizer(), stop)
    shown = []
    for token in tiny_model.tokenizer().encode(text, add_special_tokens=False).ids:
        shown.append(stream.push(token))
        if stream.stopped:
            return shown, True
    shown.append(stream.flush())
    return shown, stream.stopped


@given(st.text("abé\n", max_size=20), st.lists(st.text("abé\n", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string_to_be_whole(text, stop):
    shown, stopped = pieces(text, stop)
    found = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert stopped == bool(found)
    assert "".join(shown) == text[: min(found)[1] if found else None]


@pytest.mark.parametrize("text", ["aab", "aaab", "abaab"])
def test_a_stop_string_that_begins_within_itself(text):
    assert "".join(pieces(text, ["aab"])[0]) == text[: -len("aab")]


def test_text_comes_as_soon_as_it_is_certain():
    stream = StoppingText(tiny_model.tokenizer(), ["xy\n", "yy"])
    ids = {character: tiny_model.tokenizer().token_to_id(character) for character in "axyz"}
    shown = [stream.push(ids[character]) for character in "axaxyzy"]
    assert shown == ["a", "", "xa", "", "", "xyz", ""]
    assert stream.flush() == "y" and not stream.stopped
