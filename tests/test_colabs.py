"""The notebooks of `colabs/`: each runs from top to bottom, shortened, and is committed without outputs."""

import ast
import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

from moe_jax import files

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
INSTALLED = {"moe_jax", "jax", "numpy", "matplotlib", "IPython"}  # by the first cell, and by Jupyter itself
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook):
    """The code cells, without lines for the shell."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [re.sub(r"^!.*$", "", source, flags=re.MULTILINE) for source in sources]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["recover", "the_frontier", "turn_the_dial"]


@pytest.mark.processes
@each
def test_it_runs_and_shows_an_image(path, tmp_path):
    caches = files.cache_folder() / "xla"
    environment = os.environ | {
        "MOE_JAX_SHORT": "1",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),  # this interpreter's kernel, not one of the user's
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(caches)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    try:
        client.execute(env=environment)
    finally:
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        print(*(output.text for output in outputs if output.output_type == "stream"))  # the error of a failed launcher
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@each
def test_it_is_committed_without_outputs_and_paths_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert re.findall(r"/(?:work|home|root|tmp|Users|content)/|\b[A-Z]:\\", path.read_text()) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@each
def test_it_defines_nothing_and_needs_only_installed_packages(path):
    nodes = [node for source in code_of(nbformat.read(path, as_version=4)) for node in ast.walk(ast.parse(source))]
    assert not [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= INSTALLED | sys.stdlib_module_names


@each
def test_its_badge_and_its_first_cell_name_the_same_address(path):
    notebook = nbformat.read(path, as_version=4)
    install, short = code_of(notebook)[:2]
    [repository] = re.findall(r'^REPOSITORY = "https://github.com/(.+)"$', install, flags=re.MULTILINE)
    colab = f"https://colab.research.google.com/github/{repository}/blob/main/colabs/{path.name}"
    assert notebook.cells[0].source.startswith(f"{BADGE}({colab})\n")
    assert short == 'SHORT = bool(os.environ.get("MOE_JAX_SHORT"))'


def test_all_install_in_the_same_way():
    assert len({code_of(nbformat.read(path, as_version=4))[0] for path in NOTEBOOKS}) == 1
