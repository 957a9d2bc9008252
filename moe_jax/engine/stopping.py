"""Text that ends at a stop string, and never shows a part of one."""

from collections.abc import Sequence

import tokenizers

from moe_jax.text.tokenizer import TextStream


class StoppingText:
    """A `TextStream` that ends before the first stop string to be whole, the longest of those that end together.

    What may be the beginning of a stop string is held back until more text tells.

    Args:
        tokenizer: of the model.
        stop: strings that end the text; none of them empty.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str]):
        self._stream = TextStream(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False  # a stop string has come

    def push(self, token_id: int) -> str:
        """Takes one more id; returns the text that is now certain."""
        return self._certain(self._stream.push(token_id))

    def flush(self) -> str:
        """Ends the text; returns what was held back, unless that turns out to hold a stop string."""
        text = self._certain(self._stream.flush())
        held, self._held = self._held, ""
        return text + held

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self._held, self.stopped = "", True
            return text[: min(found)[1]]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that a stop string may begin with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
