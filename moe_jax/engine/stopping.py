"""Ends text at a stop string, without ever showing a part of it."""

from collections.abc import Sequence

import tokenizers

from moe_jax.text.tokenizer import TextStream, special_tokens


class StoppingText:
    """A `TextStream` that ends before the first complete stop string, or the longest if several end together.

    Text that may be the beginning of a stop string is held back until that is decided. Special tokens have no text; a
    stop string that names one, such as "<|im_end|>" or "</s>\\n", is searched for in the text with their names added.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end the text; none of them empty.
        before: ids of the prompt that the text continues.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str], before: Sequence[int] = ()):
        self._stream = TextStream(tokenizer, before)
        names = special_tokens(tokenizer) if stop else {}
        self._naming = tuple(text for text in stop if any(name in text for name in names.values()))
        self._plain = tuple(text for text in stop if text not in self._naming)
        self._names = names if self._naming else {}
        self._held = ""  # text held back, with the names of special tokens
        self._has_text: list[bool] = []  # of each held character: False within the name of a special token
        self.stopped = False  # whether a stop string was found

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that can no longer become part of a stop string."""
        return self._certain(self._stream.push(token_id), self._names.get(int(token_id), ""))

    def flush(self, end_id: int | None = None) -> str:
        """Ends the text; returns what was held back, up to a stop string if it has one.

        Args:
            end_id: the end-of-text token, if it ended the text. A stop string that ends with its name is removed from
                the text, but `stopped` stays as it was.
        """
        text = self._certain(self._stream.flush())
        if not self.stopped and end_id is not None:
            text += self._certain("", self._names.get(int(end_id), ""))
            self.stopped = False
        text += _text_of(self._held, self._has_text)
        self._held, self._has_text = "", []
        return text

    def _certain(self, piece: str, name: str = "") -> str:
        whole = self._held + piece + name
        has_text = self._has_text + [True] * len(piece) + [False] * len(name)
        text = _text_of(whole, has_text)
        places = [place for place, has in enumerate(has_text) if has]  # where each character of `text` is in `whole`
        found = [(places[end - 1] + 1, places[first]) for first, end in _spans(text, self._plain)]
        found += [(end, first) for first, end in _spans(whole, self._naming)]
        if found:
            first = min(found)[1]
            self._held, self._has_text, self.stopped = "", [], True
            return _text_of(whole[:first], has_text[:first])
        longest = max((_overlap(text, stop) for stop in self._plain), default=0)
        first = places[-longest] if longest else len(whole)
        first = min(first, *(len(whole) - _overlap(whole, stop) for stop in self._naming), len(whole))
        self._held, self._has_text = whole[first:], has_text[first:]
        return _text_of(whole[:first], has_text[:first])


def _text_of(whole: str, has_text: Sequence[bool]) -> str:
    return "".join(character for character, has in zip(whole, has_text) if has)


def _spans(text: str, stop: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of the first occurrence of each stop string in the text."""
    return [(text.find(end), text.find(end) + len(end)) for end in stop if end in text]


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of `text` that are the beginning of a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
