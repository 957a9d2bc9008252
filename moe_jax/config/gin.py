"""Reads gin text into a `schema.Config`, and writes a `Config` as gin text.

The grammar is gin's own, parsed by the gin-config package; its registry is not used. Accepted are bindings
`section.field = literal`, blocks of them, `include 'other.gin'`, macros `NAME = literal` and their use `%NAME`. As in
gin, the last binding of a setting or macro wins. `import`, scopes and `@references` are refused: a configuration is
data.
"""

import ast
import dataclasses
import difflib
import math
import os
import pathlib
import re
import tokenize
import typing
import warnings
from collections.abc import Iterable, Sequence

from gin import config_parser

from moe_jax.config import schema

_GRAMMAR = "`section.field = literal` (strings in quotes), `NAME = literal` or `include 'file.gin'`"
# Limits far beyond any real configuration, so that a wrong file is refused within seconds.
_MOST_BYTES, _MOST_FILES, _MOST_MACROS = 200_000, 100, 100
_MOST_INTEGER = 2**63 - 1  # the largest that arrays and JSON readers hold
_WANTED = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str

    def __repr__(self) -> str:
        return f"@{self.name}"


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return _Reference(scoped_configurable_name)

    def macro(self, macro_name):
        return _Macro(macro_name)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value and where it was set: `file:line`, or the override."""

    value: typing.Any
    where: str


@dataclasses.dataclass
class _Collected:
    """What the files have set so far, before macros are replaced."""

    settings: dict[str, _Given] = dataclasses.field(default_factory=dict)
    macros: dict[str, _Given] = dataclasses.field(default_factory=dict)
    used_macros: set[str] = dataclasses.field(default_factory=set)
    files: int = 0


def _section_types() -> dict[str, type]:
    return typing.get_type_hints(schema.Config)


def _setting_types() -> dict[str, typing.Any]:
    return {
        f"{section}.{field}": kind
        for section, section_type in _section_types().items()
        for field, kind in typing.get_type_hints(section_type).items()
    }


def read_config(path: str | os.PathLike | None, overrides: Iterable[str] = ()) -> schema.Config:
    """Reads a configuration file, then overrides.

    Args:
        path: A gin file. None: the defaults of `schema.Config`.
        overrides: Strings `section.field=value`; the last one of a setting wins, also over files. The value of a string
            setting need not be quoted (blanks around it are dropped); any other value is a literal.

    Raises:
        ValueError: Unknown name, wrong type, impossible combination, or a file that cannot be read. One line: where,
            what was given, what was expected, and the nearest known name.
    """
    collected = _Collected()
    if path is not None:
        path = pathlib.Path(path)
        if not os.path.exists(path):
            raise _refusal(str(path), f"no such config file; {_nearest_file(path)}")
        _read_file(path, collected, ())
    settings = {name: _typed(name, _without_macros(given, collected)) for name, given in collected.settings.items()}
    _refuse_unused_macros(collected)
    for override in overrides:
        name, given = _parse_override(override)
        settings[name] = _typed(name, given)
    return _build(settings)


def to_gin(config: schema.Config) -> str:
    """Writes every setting of a configuration; `read_config` reads an equal one from the text."""
    sections = []
    for section in _section_types():
        values = dataclasses.asdict(getattr(config, section))
        sections.append("".join(f"{section}.{field} = {_as_literal(value)}\n" for field, value in values.items()))
    return "\n".join(sections)


def _as_literal(value) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_literal, value))}]"
    return repr(value)


def _refusal(where: str, message: str) -> ValueError:
    """An error of one line; of a very long one, only the beginning and the end."""
    line = " ".join(line.strip() for line in f"{where}: {message}".splitlines() if line.strip())
    return ValueError(line if len(line) <= 1000 else f"{line[:500]} ... {line[-495:]}")


def _shown(value) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits or brackets
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name nearest to `name`, whatever the case of its letters."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return by_lower[difflib.get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=0.0)[0]]


def _nearest_file(path: pathlib.Path) -> str:
    if not os.path.isdir(path.parent):
        return f"there is no folder {path.parent}"
    names = sorted(file.name for file in path.parent.glob("*.gin"))
    return f"nearest: {path.parent / _nearest(path.name, names)}" if names else f"{path.parent} has no *.gin file"


def _read_file(path: pathlib.Path, collected: _Collected, including: tuple[pathlib.Path, ...]) -> None:
    collected.files += 1
    if collected.files > _MOST_FILES:
        raise _refusal(str(path), f"more than {_MOST_FILES} files are included: expected at most {_MOST_FILES}")
    including = (*including, path.resolve())
    for statement in _parse(_read_text(path), path):
        where = f"{path}:{statement.location.line_num}"
        if isinstance(statement, config_parser.IncludeStatement):
            _read_file(_locate_include(statement.filename, path, where, including), collected, including)
        elif isinstance(statement, config_parser.ImportStatement):
            raise _refusal(where, f"`{statement.format()}`: imports are not accepted; expected {_GRAMMAR}")
        else:
            _collect(statement, where, collected)


def _read_text(path: pathlib.Path) -> str:
    try:
        if not path.is_file() and not path.is_dir():  # a pipe or a device may never end
            raise _refusal(str(path), "is not a regular file; expected a gin file")
        if path.stat().st_size > _MOST_BYTES:
            raise _refusal(
                str(path), f"holds {path.stat().st_size} bytes: expected a gin file of at most {_MOST_BYTES}"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _refusal(str(path), f"cannot be read: {error.strerror}; expected a gin file") from None
    except UnicodeDecodeError as error:
        raise _refusal(str(path), f"is not UTF-8 text (byte {error.start}); expected a gin file") from None
    if "\0" in text:
        raise _refusal(str(path), "is not text (it holds zero bytes); expected a gin file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _locate_include(name: str, includer: pathlib.Path, where: str, including: Sequence[pathlib.Path]) -> pathlib.Path:
    candidate = includer.parent / name
    found = next((path for path in (candidate, pathlib.Path(name)) if os.path.exists(path)), None)
    if found is None:
        raise _refusal(where, f"include {name!r}: no such file; {_nearest_file(candidate)}")
    if found.resolve() in including:
        raise _refusal(where, f"include {name!r}: includes itself, through {' > '.join(p.name for p in including)}")
    return found


def _parse(text: str, path: pathlib.Path) -> list:
    """Splits text into gin statements; any error of the parser becomes one line."""
    statements = []
    parser = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python only warns of an unknown escape, such as '\d'
            parser = config_parser.ConfigParser(text, _Delegate())
            while (statement := parser.parse_statement()) is not None:
                statements.append(statement)
    except SyntaxError as error:
        line, problem = error.lineno, error.msg
    except tokenize.TokenError as error:
        line, problem = error.args[1][0], error.args[0]
    except (StopIteration, ValueError, TypeError, LookupError, RecursionError, MemoryError) as error:
        line, problem = parser.current_token.start[0] if parser else 1, str(error) or "unexpected end"
    else:
        return statements
    lines = text.split("\n")
    content = lines[min(line, len(lines)) - 1].strip() if line else ""
    problem = " ".join(problem.split()).rstrip(".")
    raise _refusal(f"{path}:{line}", f"cannot parse {_shown(content)} ({problem}); expected {_GRAMMAR}")


def _collect(statement, where: str, collected: _Collected) -> None:
    if statement.scope:
        raise _refusal(where, f"scope {statement.scope!r}: scopes are not accepted; expected {_GRAMMAR}")
    if isinstance(statement, config_parser.BlockDeclaration):
        if statement.selector not in _section_types():
            raise _refusal(where, _unknown_setting(statement.selector, ""))
        return
    given = _Given(statement.value, where)
    collected.used_macros.update(_macros_in(statement.value))
    if not statement.arg_name:
        collected.macros[statement.selector] = given
        return
    name = f"{statement.selector}.{statement.arg_name}"
    if name not in _setting_types():
        raise _refusal(where, _unknown_setting(statement.selector, statement.arg_name))
    collected.settings[name] = given


def _macros_in(value) -> set[str]:
    if isinstance(value, (list, tuple)):
        return set().union(*map(_macros_in, value))
    return {value.name} if isinstance(value, _Macro) else set()


def _unknown_setting(section: str, field: str) -> str:
    """Says which part of `section.field` is unknown, what exists, and the name that was probably meant."""
    settings, sections = _setting_types(), _section_types()
    if not field:
        return f"{section}: unknown section; nearest: {_nearest(section, sections)}; sections: {', '.join(sections)}"
    name = f"{section}.{field}"
    elsewhere = [setting for setting in settings if setting.endswith(f".{field}")]
    if section not in sections:
        nearest = _nearest(name, elsewhere or settings)
        return f"{name}: unknown section {section!r}; nearest: {nearest}; sections: {', '.join(sections)}"
    fields = [setting for setting in settings if setting.startswith(f"{section}.")]
    alike = difflib.get_close_matches(name[:100].lower(), fields, n=1, cutoff=0.8)
    nearest = alike[0] if alike else _nearest(name, elsewhere or fields)
    known = ", ".join(setting.split(".")[1] for setting in fields)
    return f"{name}: {section} has no {field!r}; nearest: {nearest}; {section} has {known}"


def _without_macros(given: _Given, collected: _Collected, through: tuple[str, ...] = ()) -> _Given:
    """Replaces the macros in a value, also inside lists and inside the values of other macros."""

    def replaced(value, within_list=False):
        if isinstance(value, (list, tuple)):
            if within_list:  # no setting takes one, and macros could double its size at every level
                raise _refusal(given.where, f"{_shown(value)}: a list within a list; expected a list of plain values")
            return type(value)(replaced(item, within_list=True) for item in value)
        if isinstance(value, _Reference):
            raise _refusal(given.where, f"{value}: references are not accepted; expected {_GRAMMAR}")
        if not isinstance(value, _Macro):
            return value
        if value.name in through:
            raise _refusal(given.where, f"{value}: defined by itself, through {' > '.join(through)}")
        if value.name not in collected.macros:
            known = f"nearest: %{_nearest(value.name, collected.macros)}" if collected.macros else "no macro is defined"
            raise _refusal(given.where, f"{value}: unknown macro; {known}; expected `{value.name} = literal` in a file")
        if len(through) >= _MOST_MACROS:
            raise _refusal(given.where, f"{value}: is defined through more than {_MOST_MACROS} macros")
        found = _without_macros(collected.macros[value.name], collected, (*through, value.name)).value
        return replaced(found, within_list) if isinstance(found, (list, tuple)) else found

    return _Given(replaced(given.value), given.where)


def _refuse_unused_macros(collected: _Collected) -> None:
    """Refuses unused macros: most often such a macro is a setting whose section was forgotten."""
    for name, given in collected.macros.items():
        if name not in collected.used_macros:
            fields = {setting.split(".")[1]: setting for setting in reversed(_setting_types())}
            nearest = fields[_nearest(name, fields)]
            raise _refusal(given.where, f"{name}: a macro that nothing uses; nearest: {nearest}; expected {_GRAMMAR}")


def _parse_override(override: str) -> tuple[str, _Given]:
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    name, text = name.strip(), text.strip()
    section, dot, field = name.rpartition(".")
    if not equals or not dot:
        raise _refusal(where, f"expected section.field=value; nearest: {_nearest(name, _setting_types())}")
    if name not in _setting_types():
        raise _refusal(where, _unknown_setting(section, field))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        value = text
    if _setting_types()[name] is str and not isinstance(value, str):
        value = text
    return name, _Given(value, where)


def _typed(name: str, given: _Given) -> _Given:
    kind = _setting_types()[name]
    if not _fits(given.value, kind):
        raise _refusal(given.where, f"{name} = {_shown(given.value)}: expected {_wanted(kind)}")
    try:
        value = _converted(given.value, kind)
    except OverflowError:
        value = math.inf
    if expected := _wanted_instead(value, kind):
        raise _refusal(given.where, f"{name} = {_shown(given.value)}: expected {expected}")
    return _Given(value, given.where)


def _wanted_instead(value, kind) -> str:
    """What to expect instead of a value of the right type that arrays or files cannot hold; "" if they can."""
    if item := _item_kind(kind):
        return next(filter(None, (_wanted_instead(part, item) for part in value)), "")
    if kind is str and "\0" in value:
        return "text without zero bytes"
    if kind is int and abs(value) > _MOST_INTEGER:
        return f"an integer of at most {_MOST_INTEGER}"
    return "a number of at most 1.8e308" if kind is float and not math.isfinite(value) else ""


def _item_kind(kind):
    """T of `tuple[T, ...]`, or None."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _wanted(kind) -> str:
    item = _item_kind(kind)
    if item is None:
        return _WANTED[kind]
    return "a list of strings, as in ['a', 'b']" if item is str else f"a list, each item {_WANTED[item]}"


def _fits(value, kind) -> bool:
    item = _item_kind(kind)
    if item is not None:
        return isinstance(value, (list, tuple)) and all(_fits(part, item) for part in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _converted(value, kind):
    item = _item_kind(kind)
    return tuple(_converted(part, item) for part in value) if item is not None else kind(value)


def _build(settings: dict[str, _Given]) -> schema.Config:
    """Makes the configuration; an error of the schema gets the file and line of the setting that it names."""
    try:
        sections = {}
        for section, section_type in _section_types().items():
            fields = {field.name: f"{section}.{field.name}" for field in dataclasses.fields(section_type)}
            chosen = {field: settings[name].value for field, name in fields.items() if name in settings}
            sections[section] = section_type(**chosen)
        return schema.Config(**sections)
    except ValueError as error:
        mentioned = re.findall(r"\b[a-z_]\w*\.[a-z_]\w*", str(error))
        where = next((settings[name].where for name in mentioned if name in settings), None)
        raise (ValueError(str(error)) if where is None else _refusal(where, str(error))) from None
