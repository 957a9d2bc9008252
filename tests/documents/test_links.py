"""Links, images, anchors and paths of the documents lead somewhere, and the README is short."""

import re

from tests.documents import written
from tests.documents.written import DOCUMENTS, ROOT

README = ROOT / "README.md"
MOST_BYTES = 9216  # of the README, for two minutes of reading
COLAB = "https://colab.research.google.com/github/moe-jax/moe_jax/blob/main/"
NAMES = re.compile(r"(?<![\w/.*`-])((?:[\w-]+/)+|[\w-]+\.(?:py|sh|gin))(?![\w/*.])")


def link_problem(path, target):
    """What is wrong with a link of a document."""
    if target.startswith(COLAB):
        return "" if (ROOT / target.removeprefix(COLAB)).is_file() else f"{path.name}: no notebook {target}"
    if target.startswith("https://"):
        return ""
    name, _, anchor = target.partition("#")
    to = path.parent / name if name else path
    if not to.exists():
        return f"{path.name}: no {target}"
    return "" if not anchor or anchor in written.anchors(to) else f"{path.name}: no heading {target}"


def paths_in_code(text):
    """The paths that a text names in `code`: those that begin with a folder of the repository, or of the package."""
    tops = [path.name for folder in (ROOT, ROOT / "moe_jax") for path in folder.iterdir() if path.is_dir()]
    return re.findall(rf"`((?:{'|'.join(map(re.escape, tops))})/[\w./*-]*)`", text)


def exists(name):
    """Whether a path, which may have a `*`, is in the repository or in the package."""
    return any(next(folder.glob(name.rstrip("/")), None) for folder in (ROOT, ROOT / "moe_jax"))


def paths_in_tree(tree):
    """The files and folders that the README's tree names, as possible paths.

    The first column has paths, each below the last line that is less indented. Names in the rest of a line, and of the
    lines below it without a first column, are in that line's folder, or paths from the root.
    """
    folders = {}  # indentation -> folder
    for line in tree.splitlines():
        depth, names = len(line) - len(line.lstrip()), NAMES.findall(line)
        if depth <= 4:
            folders = {at: folder for at, folder in folders.items() if at < depth}
            first = line.split()[0]
            yield ("".join(folders.values()) + first,)
            folders |= {depth: first} if first.endswith("/") else {}
            names = names[1:]
        yield from (("".join(folders.values()) + name, name) for name in names)


def missing_in_tree(tree):
    """The paths in the README's tree that do not exist."""
    return [paths[0] for paths in paths_in_tree(tree) if not any((ROOT / path).exists() for path in paths)]


def the_tree():
    [tree] = [content for _, language, content in written.fences(README) if language == "text"]
    return tree


def test_links_lead_somewhere():
    found = [(path, target) for path in DOCUMENTS for target in written.links(path)]
    assert [problem for link in found if (problem := link_problem(*link))] == []
    assert len(found) > 12


def test_paths_in_code_exist():
    found = [(path.name, name) for path in DOCUMENTS for name in paths_in_code(written.without_fences(path))]
    assert [(document, name) for document, name in found if not exists(name)] == []
    assert len(found) > 40


def test_the_tree_of_the_readme_is_that_of_the_repository():
    tree = the_tree()
    assert missing_in_tree(tree) == []
    named = {paths[0].split("/")[1] for paths in paths_in_tree(tree) if paths[0].startswith("moe_jax/")}
    package = {path.name for path in (ROOT / "moe_jax").iterdir() if not path.name.startswith("_")}
    assert package - named == set(), "a part of the package that the tree leaves out"


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= MOST_BYTES


def test_broken_links_are_found():
    for target in ("docs/runs.md", "#usage", "docs/run.md#nowhere", f"{COLAB}colabs/turn.ipynb"):
        assert link_problem(README, target), target
    assert not link_problem(README, "#use") and not link_problem(README, "docs/run.md#fine-tune")
    assert paths_in_code("`kernels/chosen.py` `out/a` `moe_jax/dims.py`") == ["kernels/chosen.py", "moe_jax/dims.py"]
    assert not exists("kernels/chosen.py") and exists("kernels/chooser.py") and exists("docs/*.md")
    assert missing_in_tree("moe_jax/\n  model/  rope.py, ropes.py\n    moes.py  a\n  apis.py\n          rope.py") == [
        *("moe_jax/model/ropes.py", "moe_jax/model/moes.py", "moe_jax/apis.py", "moe_jax/rope.py")
    ]
