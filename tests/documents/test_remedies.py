"""What messages, comments, configs and documents recommend exists: settings, their values, flags and files."""

import ast
import io
import re
import tokenize

import pytest

from moe_jax.config import gin, schema
from moe_jax.routing.policies.parse import parse
from tests.documents import written
from tests.documents.written import ROOT

SETTINGS = set(re.findall(r"^(\w+\.\w+) = ", gin.to_gin(schema.Config()), re.MULTILINE))
SECTIONS = sorted({name.split(".")[0] for name in SETTINGS})
SUFFIXES = ("csv", "gguf", "gin", "html", "json", "jsonl", "md", "npz", "png", "py", "safetensors", "sh", "txt")
TENSORS = {"model.embed_tokens", "model.layers", "model.norm"}  # how published checkpoints begin their names
NAME = re.compile(
    rf"(?<![\w./`-])((?:{'|'.join(SECTIONS)})\.(?!(?:{'|'.join(SUFFIXES)})\b)[a-z_]\w*)(?:=([\w.:,+/]+))?"
)
PATH = re.compile(
    r"(?<![\w/.{}])((?:launch|configs|docs|benchmarks|assets)/[\w./-]*\w|requirements[\w-]*\.txt)(?![\w*{])"
)
FLAG = re.compile(r"(?<![\w(-])--(?:\[no\])?([a-z]\w*)\b(?!\s*:)")  # no properties of CSS
OTHER_FLAGS = {"help", "version", "xla_gpu_deterministic_ops"}  # absl's, and the compilers'


def strings(source):
    """The literals of Python code that are no docstrings; of an f-string, the fixed parts."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def comments(source):
    """The comments of Python code."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def texts():
    """(path, text) of every message, comment, config and document."""
    for folder in ("moe_jax", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text()
            yield from ((path, text) for text in (*strings(source), *comments(source)))
    for path in [*sorted((ROOT / "configs").rglob("*.gin")), ROOT / "assets" / "demo" / "MODEL_CARD.md"]:
        yield path, path.read_text()
    for path in written.DOCUMENTS:
        yield path, written.without_fences(path)


def defined_flags():
    """The flags of all launchers and benchmarks."""
    sources = [
        path.read_text()
        for folder in ("launch", "benchmarks", "moe_jax/command")
        for path in (ROOT / folder).glob("*.py")
    ]
    return {name for source in sources for name in re.findall(r'(?:DEFINE_\w+\(\s*"|add_argument\("--)(\w+)"', source)}


FLAGS = defined_flags() | OTHER_FLAGS


def setting_problem(name, value):
    """What is wrong with `name=value` as a recommendation."""
    if name not in SETTINGS:
        return f"no setting {name}"
    if not value:
        return ""
    try:
        config = gin.read_config(None, [f"{name}={value}"])
        parse(config.policy.spec)
    except ValueError as error:
        return str(error)
    return ""


def problems(text):
    """What a text recommends that does not exist."""
    found = [
        setting_problem(name, (value or "").rstrip(".,:")) for name, value in NAME.findall(text) if name not in TENSORS
    ]
    found += [f"no {path}" for path in PATH.findall(text) if not (ROOT / path).exists()]
    found += [f"no flag --{name}" for name in FLAG.findall(text) if name not in FLAGS]
    return [problem for problem in found if problem]


def test_what_is_recommended_exists():
    found, mentioned = {}, 0
    for path, text in texts():
        mentioned += len(NAME.findall(text))
        if wrong := problems(text):
            found.setdefault(str(path.relative_to(ROOT)), []).extend(wrong)
    assert found == {}
    assert mentioned > 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("expected another model.path, or model.dtyp=auto", ["no setting model.dtyp"]),
        ("with model.dtype=float3", ["--set model.dtype=float3"]),
        ("policy.spec=topq:4 would", ["topq:4"]),
        (
            "launch/calibrat.py measures it; see requirements-peer.txt",
            ["no launch/calibrat.py", "no requirements-peer.txt"],
        ),
        ("give another --ou", ["no flag --ou"]),
        ("model.layers.0 in sweep.py, policy.spec=topk:4, launch/infer.py --set", []),
    ],
)
def test_what_does_not_exist_is_found(text, expected):
    found = problems(text)
    assert len(found) == len(expected)
    assert all(part in problem for part, problem in zip(expected, found, strict=True))
