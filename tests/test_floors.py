"""The order of packages: imports point down, and each file states its subject."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "moe_jax"
FLOORS = (
    ("dims", "files", "memory", "config"),
    ("text", "routing", "kernels"),
    ("dispatch",),
    ("model",),
    ("checkpoint", "engine", "cost"),
    ("evaluation", "training"),
    ("study", "conversion"),
    ("report",),
    ("api", "command", "__init__"),
)
SIDEWAYS = {
    ("training", "evaluation"),  # training evaluates as it goes
}
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TOP = len(FLOORS) - 1
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path):
    """The package or module directly below `moe_jax` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_packages(tree, folder):
    """The packages that code in a folder (dotted) imports anywhere; `import moe_jax` is its `__init__`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder.split(".")[: len(folder.split(".")) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "moe_jax" else [module]
    parts = [name.split(".") for name in names]
    return {part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == "moe_jax"}


def violations(package, tree, folder):
    """The imports in a file of a package that break the rule, which exempts the modules of the top floor."""
    broken = []
    for imported in sorted(imported_packages(tree, folder) - {package}):
        if (package, imported) in SIDEWAYS:
            continue
        if imported not in FLOOR_OF:
            broken.append(f"{imported} has no floor")
        elif FLOOR_OF[imported] >= FLOOR_OF[package] and FLOOR_OF[package] != TOP:
            broken.append(f"{package} (floor {FLOOR_OF[package]}) imports {imported} (floor {FLOOR_OF[imported]})")
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert package_of(path) in FLOOR_OF, f"give {package_of(path)} a floor"
    folder = ".".join(path.parent.relative_to(ROOT).parts)
    assert violations(package_of(path), ast.parse(path.read_text()), folder) == []


@pytest.mark.parametrize(
    ("package", "source", "refused"),
    [
        ("model", "from moe_jax.routing import selection", False),
        ("model", "import jax, moe_jaxlike", False),
        ("model", "from moe_jax.model import rope", False),
        ("model", "from . import rope", False),
        ("model", "from ..routing import selection", False),
        ("model", "from moe_jax.engine import cache", True),
        ("model", "import moe_jax.engine.cache", True),
        ("model", "def later():\n    from moe_jax import engine", True),
        ("model", "from ..engine import cache", True),
        ("model", "from .. import engine", True),
        ("model", "import moe_jax", True),
        ("model", "from moe_jax import command", True),
        ("model", "from moe_jax.attic import old", True),
        ("engine", "from moe_jax.checkpoint import families", True),
        ("training", "from moe_jax.evaluation import likelihood", False),
        ("evaluation", "from moe_jax.training import loop", True),
        ("report", "from moe_jax.study import frontier", False),
        ("study", "from moe_jax.report import figures", True),
        ("command", "from moe_jax import api", False),
    ],
)
def test_the_rule_itself(package, source, refused):
    assert bool(violations(package, ast.parse(source), f"moe_jax.{package}")) == refused


def test_launchers_hold_no_preamble_twice():
    """No two launchers share three consecutive statements, apart from imports."""
    seen = {}
    for path in sorted((ROOT / "launch").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            statements = getattr(node, "body", [])
            if isinstance(node, ast.Module) or not isinstance(statements, list):
                continue
            code = [ast.unparse(one) for one in statements if not isinstance(one, ast.Import | ast.ImportFrom)]
            for three in zip(code, code[1:], code[2:]):
                assert seen.setdefault(three, path) == path, f"{path.name} and {seen[three].name}: {three}"


SUBJECTS = [path for path in FILES if path.read_text().strip()]
SUBJECTS += sorted(path for folder in ("launch", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SUBJECTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_docstring_line_states_the_subject(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "expected a docstring"
    first, *rest = docstring.split("\n")
    assert first.endswith((".", ":")) and (not rest or rest[0] == ""), "expected a sentence on a line of its own"


MOST_LINES = 400  # of a file of code


def test_no_file_is_too_long_to_read():
    folders = [ROOT / name for name in ("moe_jax", "launch", "tests", "benchmarks")]
    paths = [path for folder in folders for kind in ("py", "cc", "h") for path in folder.rglob(f"*.{kind}")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert len(lines) > 200
