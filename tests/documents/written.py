"""The parts of documents that can be checked: commands, code, links and anchors."""

import ast
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "python|bash|pip|head"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A command as written, and the documents that contain it."""

    text: str
    where: str  # path:line, or several

    @property
    def pipelines(self) -> list[list[list[str]]]:
        """The words of each command: those that run in turn, and within them those joined by a pipe."""
        turns = [[[]]]
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        for word in lexer:
            if word == "&&":
                turns.append([[]])
            elif word == "|":
                turns[-1].append([])
            else:
                turns[-1][-1].append(word)
        return turns


def fences(path: pathlib.Path) -> Iterator[tuple[int, str, str]]:
    """The first line number, the language and the content of each fenced block."""
    text = path.read_text()
    for found in _FENCE.finditer(text):
        yield text.count("\n", 0, found.start()) + 2, found[1], found[2]


def without_fences(path: pathlib.Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def _in_fences(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Every line of a block without a language is a command."""
    for first, language, content in fences(path):
        if not language:
            for number, line in enumerate(content.replace("\\\n", "\0").splitlines()):
                yield first + number, " ".join(line.replace("\0", " ").split())


def _in_line(text: str) -> Iterator[tuple[int, str]]:
    for found in re.finditer(rf"(?<!`)`((?:{PROGRAMS}) [^`]+)`", text):
        yield text.count("\n", 0, found.start()) + 1, re.sub(r"\s*\n[# ]*", " ", found[1])


def _in_comments(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The first line of a config, if it is a command."""
    first = path.read_text().splitlines()[0].removeprefix("# ")
    if re.match(rf"(?:{PROGRAMS}) ", first):
        yield 1, first


def _in_docstring(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    for number, line in enumerate(docstring.splitlines(), 1):
        if re.match(rf"    (?:{PROGRAMS}) ", line):
            yield number, line.strip()
    yield from _in_line(docstring)


def commands() -> list[Command]:
    """All commands in documents, configs, launchers and benchmarks, each once."""
    found: dict[str, list[str]] = {}
    sources = [(path, reader) for path in DOCUMENTS for reader in (_in_fences, lambda path: _in_line(path.read_text()))]
    sources += [(path, _in_comments) for path in sorted((ROOT / "configs").rglob("*.gin"))]
    for folder in ("launch", "benchmarks", "assets", "moe_jax"):
        sources += [(path, _in_docstring) for path in sorted((ROOT / folder).rglob("*.py"))]
    sources += [(path, lambda path: _in_line(path.read_text())) for path in sorted((ROOT / "benchmarks").glob("*.sh"))]
    for path, reader in sources:
        for number, text in reader(path):
            found.setdefault(text, []).append(f"{path.relative_to(ROOT)}:{number}")
    return [Command(text, " ".join(places)) for text, places in found.items()]


def links(path: pathlib.Path) -> list[str]:
    """The targets of all links and images, reference definitions included."""
    text = without_fences(path)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", without_fences(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
