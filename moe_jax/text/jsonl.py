"""Reads JSON lines: each is a text, or a conversation that a chat template renders as text."""

import codecs
import gzip
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Renders the messages of a whole conversation; raises ValueError if the template refuses them.
Chat = Callable[[Sequence[Mapping[str, Any]]], str]

_OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
_FIELDS = ("text", "messages")
_SHOWN_CHARACTERS = 100  # of a refused value, in messages


class Line(NamedTuple):
    """One line: its number in the file, from 1; its text; whether special tokens in the text are encoded as such."""

    number: int
    text: str
    special_tokens: bool


def is_jsonl(name: str) -> bool:
    """Whether a file's name ends in `.jsonl`, `.jsonl.gz` or `.jsonl.xz`."""
    return name.lower().endswith(tuple(_OPENERS))


def read_lines(path: str | os.PathLike, chat: Chat | None = None) -> Iterator[Line]:
    r"""Reads a file of JSON lines in UTF-8, one line at a time; blank lines are skipped, but counted.

    A line is `{"text": "..."}` or `{"messages": [{"role": "user", "content": "..."}, ...]}`. Other fields are ignored;
    those of a message are passed to the template. Lines end with `\n` alone, so texts may hold other line separators.

    Args:
        path: a file for which `is_jsonl` holds.
        chat: renders conversations, from `chat.load_renderer`; None: there is no template.

    Yields:
        The lines in order. Special tokens are encoded as such in conversations only, even where a message spells one.

    Raises:
        ValueError: the file is unreadable, or a line is damaged, has neither field or both, or is a conversation that
            cannot be rendered. The message names the file and the line.
    """
    path = pathlib.Path(path)
    opener = next(opener for suffix, opener in _OPENERS.items() if path.name.lower().endswith(suffix))
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield _parse(line, number, f"{path}, line {number}", chat)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is unreadable after line {number}: {error}") from error


def _parse(line: bytes, number: int, where: str, chat: Chat | None) -> Line:
    try:
        fields = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} = {_shown(fields)}: expected an object with text or messages")
    names = [name for name in _FIELDS if fields.get(name) is not None]
    if len(names) != 1:
        raise ValueError(f"{where} has {' and '.join(names) or 'neither text nor messages'}: expected one of the two")
    is_chat = names == ["messages"]
    text = _render(fields["messages"], where, chat) if is_chat else fields["text"]
    if not isinstance(text, str):
        raise ValueError(f"{where}: text = {_shown(text)}: expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair: expected Unicode text") from error
    return Line(number, text, is_chat)


def _render(messages: Any, where: str, chat: Chat | None) -> str:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages = {_shown(messages)}: expected a list of one message or more")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: messages[{index}] = {_shown(message)}: expected an object")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                value = _shown(message.get(name))
                raise ValueError(f"{where}: messages[{index}].{name} = {value}: expected a string")
    if chat is None:
        raise ValueError(
            f"{where} has messages, but the model's folder has no chat template: expected chat_template.jinja, or "
            "chat_template in tokenizer_config.json, or lines with text"
        )
    try:
        return chat(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _shown(value: Any) -> str:
    return json.dumps(value)[:_SHOWN_CHARACTERS]
