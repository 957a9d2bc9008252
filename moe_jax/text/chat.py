"""Chat templates of checkpoints, in Jinja, rendered as `transformers` does.

Templates come with models and are not trusted: they run in Jinja's sandbox.
"""

import datetime
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from moe_jax.text import declared


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the model's text for training; rendered without a mark."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without escaped HTML characters, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(text: str) -> str:
    return datetime.datetime.now().strftime(text)


def load_template(folder: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """Reads a model's chat template: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    Returns:
        The template, and the special tokens that it may use, such as `bos_token`.

    Raises:
        ValueError: there is none, or a file is damaged.
    """
    template, special_tokens = _find_template(pathlib.Path(folder))
    if template is None:
        raise ValueError(
            f"{folder} has no chat template: expected chat_template.jinja or chat_template in tokenizer_config.json; a "
            "model that was not tuned for chat takes plain prompts"
        )
    return template, special_tokens


def load_renderer(folder: str | os.PathLike) -> Callable[[Sequence[Mapping[str, Any]]], str] | None:
    """Returns `render_conversation` for a model's chat template; None if it has none.

    Raises:
        ValueError: a file is damaged.
    """
    template, special_tokens = _find_template(pathlib.Path(folder))
    return None if template is None else functools.partial(render_conversation, template, special_tokens)


def _find_template(folder: pathlib.Path) -> tuple[str | None, dict[str, str]]:
    template = declared.read_fields(folder / declared.CONFIG).get("chat_template")
    if isinstance(template, list):  # several templates, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return template if isinstance(template, str) else None, declared.read_named(folder)


def render(template: str, special_tokens: dict[str, str], message: str) -> str:
    """Renders one user message, and the opening of the model's answer."""
    return render_messages(template, special_tokens, [{"role": "user", "content": message}])


def render_messages(
    template: str, special_tokens: Mapping[str, str], messages: Sequence[Mapping[str, str]], answer: bool = True
) -> str:
    """Renders a conversation, and the opening of the model's answer.

    The text holds all special tokens: encode it without adding any.

    Args:
        template: as `load_template` gives it.
        special_tokens: as `load_template` gives them.
        messages: each with a `role` and a `content`.
        answer: whether to open the model's answer. If not, the text ends with the last message's content, for the model
            to continue.

    Raises:
        ValueError: the template is not Jinja, does what the sandbox forbids, or refuses the messages.
    """
    text = _apply(template, special_tokens, messages, answer)
    if answer:
        return text
    last = messages[-1]["content"].strip()
    if last not in text:
        raise ValueError(f"the chat template leaves out the last message, {last!r}: the model cannot continue it")
    return text[: text.rindex(last) + len(last)]


def render_conversation(template: str, special_tokens: Mapping[str, str], messages: Sequence[Mapping[str, Any]]) -> str:
    """Renders a whole conversation, as text to train on: the last message is closed, no answer is opened.

    The text holds all special tokens: encode it without adding any.

    Args:
        template: as `load_template` gives it.
        special_tokens: as `load_template` gives them.
        messages: each with a `role`, a `content`, and any other fields that the template reads.

    Raises:
        ValueError: as `render_messages`.
    """
    return _apply(template, special_tokens, messages, False)


def _apply(
    template: str, special_tokens: Mapping[str, str], messages: Sequence[Mapping[str, Any]], answer: bool
) -> str:
    names = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": answer}
    try:
        return _compile(template).render(**names, **special_tokens)
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(f"the chat template cannot be applied: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compiles a template, once: that takes longer than rendering, and training text has many conversations."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)
