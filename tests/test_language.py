"""The words that this project does not write, names that mean one thing, and the form of docstrings."""

import ast
import collections
import itertools
import pathlib
import re

import pytest

HOMEMADE = (
    *("so many", "quickly told", "an even cut", "say nothing", "says nothing", "whoever", "nobody's", "anew"),
    *("there and back", "have a say", "has a say", "of one's own", "alike in", "goes along", "storm of kills"),
    *("behind", "to the last bit", "hands out", "for the sake"),
)
RIDDLES = re.compile("(of|wanted)(_|$)")  # how no variable is called: say what it is, or "expected"
IN_STRINGS = ("wanted",)  # fine as a part of a name, not in what a user reads: say "expected"
ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("moe_jax", "launch", "configs", "docs", "benchmarks", "colabs", "tests")
KINDS = {".py", ".md", ".gin", ".sh", ".cc", ".h", ".ipynb", ".html"}
FILES = [ROOT / "README.md"]
FILES += sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in KINDS and not path.is_relative_to(ROOT / "benchmarks" / "results")
)
FILES.remove(pathlib.Path(__file__))  # it has the words
# Every definition of a name that had several meanings; `load` reads the weights of a model.
DEFINED = {
    "load": {"load", "Checkpoint.load", "Command.load"},
    "Model": {"Model"},
    "Batch": {"Batch"},
    "Subject": set(),
    "Layers": set(),
    "draw": set(),
}
SAME_INTERFACE = {"System", "Tiles"}  # one class in each module of benchmarks/systems, and for each chip


def occurrences(text, phrases):
    """The phrases in a text as whole words, ignoring case; a phrase may continue on the next line of a comment."""
    between = r"[\s#/*]+"
    return [one for one in phrases if re.search(rf"\b{one.replace(' ', between)}\b", text, re.IGNORECASE)]


def strings(source):
    """All string literals of Python code, docstrings and the fixed parts of f-strings included."""
    return "\n".join(
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def homemade(text, is_python):
    """The words of a file that this project does not write."""
    return occurrences(text, HOMEMADE) + (occurrences(strings(text), IN_STRINGS) if is_python else [])


def test_no_file_has_a_homemade_word():
    assert {path.suffix for path in FILES} == KINDS
    found = {str(path.relative_to(ROOT)): homemade(path.read_text(), path.suffix == ".py") for path in FILES}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1  # of So\n# many rows", ["so many"]),
        ("raise ValueError(f'{1} wanted, got {2}')", ["wanted"]),
        ("def f():\n    '''What is wanted.'''", ["wanted"]),
        ("wanted = wanted_B = 'unwanted, wanted_B'", []),
        ("also_many = 'also many'", []),
    ],
)
def test_words_are_found_in_text_and_names_are_spared(text, expected):
    assert homemade(text, True) == expected


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


def sections_otherwise_indented(source):
    """The lines that open a section of a docstring whose contents are not indented by four spaces."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            lines = (ast.get_docstring(node) or "").split("\n")
            for line, content in itertools.pairwise(lines):
                if line in SECTIONS and not re.match(r" {4}\S", content):
                    found.append(f"{getattr(node, 'name', 'module')}: {line}")
    return found


def test_docstring_sections_are_indented_by_four_spaces():
    sources = [path for folder in (*FOLDERS, "tests", "assets") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): sections_otherwise_indented(path.read_text()) for path in sources}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert sections_otherwise_indented('def f(a):\n    """F.\n\n    Args:\n      a: b.\n    """') == ["f: Args:"]


def definitions(source):
    """The qualified names of all classes and functions in Python code, with their nodes."""
    found = []

    def visit(node, outer):
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{outer}.{child.name}".lstrip(".")
                found.append((name, child))
            visit(child, name)

    visit(ast.parse(source), "")
    return found


@pytest.fixture(scope="module")
def code():
    """The definitions of each file of Python code."""
    return {path: definitions(path.read_text()) for path in FILES if path.suffix == ".py"}


@pytest.mark.parametrize("name", DEFINED)
def test_a_name_has_one_meaning(code, name):
    found = [qualified for defined in code.values() for qualified, _ in defined if qualified.rpartition(".")[2] == name]
    assert sorted(found) == sorted(DEFINED[name])


def variables(source):
    """The names of all variables and arguments in Python code."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def test_variables_are_named_by_what_they_are():
    paths = [path for path in FILES if path.suffix == ".py"]
    found = {str(path.relative_to(ROOT)): sorted(filter(RIDDLES.match, variables(path.read_text()))) for path in paths}
    assert {path: names for path, names in found.items() if names} == {}
    assert variables("of_x = [wanted for wanted in y]\ndef f(of, *z): ...") == {"of_x", "wanted", "of", "z"}


def test_no_two_classes_have_one_name(code):
    places = collections.defaultdict(list)
    for path, defined in code.items():
        for name, node in defined:
            if isinstance(node, ast.ClassDef) and not path.is_relative_to(ROOT / "tests"):
                places[node.name].append(f"{path.relative_to(ROOT)}: {name}")
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in SAME_INTERFACE} == {}


def test_definitions_are_found_in_classes_and_functions():
    source = "class A:\n    def load(self):\n        def draw(): ...\nif True:\n    async def load(): ..."
    assert [name for name, _ in definitions(source)] == ["A", "A.load", "A.load.draw", "load"]
