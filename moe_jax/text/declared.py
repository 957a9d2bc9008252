"""Special tokens that a model's folder declares outside tokenizer.json, and the tokens that it adds around a text.

`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` come from transformers, whose versions read
them differently: up to 4.57 `add_bos_token` decides, version 5 ignores it if there is a tokenizer.json. Here the
folder's declarations are followed; a warning says where they differ from tokenizer.json alone.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from absl import logging

CONFIG = "tokenizer_config.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read_fields(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}: expected an object")
    return fields


def read_named(folder: pathlib.Path) -> dict[str, str]:
    """Reads the tokens with a role, such as `bos_token`, by role; `tokenizer_config.json` wins.

    Raises:
        ValueError: a file is damaged.
    """
    fields = {**read_fields(folder / _MAP), **_without_null(read_fields(folder / CONFIG))}
    named = {role: _content(fields.get(role)) for role in _ROLES}
    return {role: content for role, content in named.items() if content is not None}


def apply(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> tokenizers.Tokenizer:
    """Applies the folder's other files to the tokenizer of tokenizer.json; changes it, or returns another.

    Tokens that are declared special become special: their characters are encoded as the token, and decoding leaves them
    out. `add_bos_token` and `add_eos_token`, where declared, decide whether those tokens are put around a text.

    Raises:
        ValueError: a file is damaged, a token cannot have its declared id, or a token to put around a text does not
            exist.
    """
    fields = read_fields(folder / CONFIG)
    _add_tokens(tokenizer, folder, fields)
    return _with_outer_tokens(tokenizer, folder, fields)


class _Declared(NamedTuple):
    """One declared token: its id, if declared, and whether it is special."""

    token_id: int | None
    special: bool
    options: Mapping[str, bool]


def _declared(folder: pathlib.Path, fields: Mapping[str, Any]) -> dict[str, _Declared]:
    """The declared tokens by their characters: those with an id first, in order of ids."""
    by_map = read_fields(folder / _MAP)
    special: dict[str, Any] = {}
    for source in (by_map, fields):
        tokens = [token for name in _LISTS for token in _each(source.get(name))]
        tokens += [value for name, value in source.items() if name.endswith("_token")]
        special |= {content: token for token in tokens if (content := _content(token)) is not None}
    with_id = {}
    decoder = fields.get("added_tokens_decoder")
    if not isinstance(decoder or {}, dict):
        raise ValueError(f"{folder / CONFIG}: added_tokens_decoder is not an object: expected tokens by their ids")
    entries = list((decoder or {}).items())
    entries += [(number, content) for content, number in read_fields(folder / _ADDED).items()]
    for number, token in entries:
        content = _content(token)
        if content is None or not str(number).isdecimal():
            raise ValueError(
                f"{folder}: {json.dumps(token)[:100]} is declared as the token {number!r}: expected one, by id"
            )
        is_special = content in special or (isinstance(token, dict) and token.get("special") is True)
        with_id.setdefault(content, _Declared(int(number), is_special, _options(token)))
    ordered = dict(sorted(with_id.items(), key=lambda item: item[1].token_id))
    without_id = {content: token for content, token in special.items() if content not in ordered}
    return ordered | {content: _Declared(None, True, _options(token)) for content, token in without_id.items()}


def _add_tokens(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path, fields: Mapping[str, Any]) -> None:
    special_before = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for content, declared in _declared(folder, fields).items():
        before = tokenizer.token_to_id(content)
        is_new = before is None and declared.token_id is not None
        if is_new or (before is not None and declared.special and content not in special_before):
            add = tokenizer.add_special_tokens if declared.special else tokenizer.add_tokens
            add([tokenizers.AddedToken(content, **{"normalized": not declared.special, **declared.options})])
            kind = "a special token" if declared.special else "a token"
            _warn_once(f"{folder}: {content!r} is {kind}, as declared outside tokenizer.json")
        token_id = tokenizer.token_to_id(content)
        if declared.token_id is not None and token_id != declared.token_id:
            raise ValueError(
                f"{folder}: {content!r} is declared as the token {declared.token_id}: tokenizer.json has it, or the "
                f"next free place, at {token_id}"
            )


def _with_outer_tokens(
    tokenizer: tokenizers.Tokenizer, folder: pathlib.Path, fields: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    named = read_named(folder)
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    encoded = tokenizer.encode("a").ids
    first = next((at for at in range(len(encoded)) if encoded[at : at + len(bare)] == bare), 0)
    outer = {"bos_token": encoded[:first], "eos_token": encoded[first + len(bare) :]}
    changed = []
    for role, ids in outer.items():
        expected = fields.get(f"add_{role}")
        if expected is None:
            continue
        if not isinstance(expected, bool):
            raise ValueError(f"{folder / CONFIG}: add_{role} = {json.dumps(expected)[:100]}: expected true or false")
        token_id = tokenizer.token_to_id(named[role]) if role in named else None
        if expected and token_id is None:
            raise ValueError(
                f"{folder / CONFIG}: add_{role} = true and {role} = {json.dumps(named.get(role))}: expected a token of "
                "tokenizer.json"
            )
        if expected == (token_id in ids):
            continue
        changed.append(role)
        if expected:
            outer[role] = [token_id, *ids] if role == "bos_token" else [*ids, token_id]
            where = "before" if role == "bos_token" else "after"
            _warn_once(
                f"{folder}: add_{role} = true: {named[role]!r} stands {where} a text, where tokenizer.json puts none"
            )
        else:
            outer[role] = [other for other in ids if other != token_id]
            _warn_once(
                f"{folder}: add_{role} = false: {named[role]!r}, which tokenizer.json puts around a text, is left out"
            )
    return _reframed(tokenizer, outer["bos_token"], outer["eos_token"]) if changed else tokenizer


def _reframed(tokenizer: tokenizers.Tokenizer, before: list[int], after: list[int]) -> tokenizers.Tokenizer:
    """A copy of the tokenizer with other tokens around a text; only a ByteLevel step of the post-processor stays."""
    fields = json.loads(tokenizer.to_str())
    processor = fields["post_processor"]
    steps = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step and step["type"] == "ByteLevel"]

    def framed(sequence: str, type_id: int) -> list[dict[str, Any]]:
        pieces = [("SpecialToken", tokenizer.id_to_token(token)) for token in before]
        pieces += [("Sequence", sequence), *(("SpecialToken", tokenizer.id_to_token(token)) for token in after)]
        return [{kind: {"id": name, "type_id": type_id}} for kind, name in pieces]

    names = {tokenizer.id_to_token(token): token for token in (*before, *after)}
    template = {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in names.items()},
    }
    fields["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}
    return tokenizers.Tokenizer.from_str(json.dumps(fields))


def _content(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _options(value: Any) -> dict[str, bool]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {name: value[name] for name in names if isinstance(value, dict) and isinstance(value.get(name), bool)}


def _each(value: Any) -> list[Any]:
    """The tokens of a list, or of an object that names each."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _without_null(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@functools.cache
def _warn_once(message: str) -> None:
    """Warns once per process, since a folder's tokenizer is loaded several times."""
    logging.warning("%s", message)
