"""Links, images, anchors and paths of the documents lead somewhere, and the README is short."""

import re

from tests.documents import written
from tests.documents.written import ROOT

MOST_BYTES = 9216  # of the README: two minutes of reading
COLAB = "https://colab.research.google.com/github/moe-jax/moe_jax/blob/main/"


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
    """The paths that a text names in `code`: those that begin with a folder of the repository."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    return re.findall(rf"`((?:{folders})/[\w./*-]*)`", text)


def path_problem(path, name):
    """What is wrong with a path of the repository that a document names; `out/` is what commands write."""
    exists = next(ROOT.glob(name), None) if "*" in name else (ROOT / name).exists()
    return "" if exists or name.startswith("out/") else f"{path.name}: no {name}"


def paths_in_tree(tree):
    """The files and folders that a tree of the README names: indentation says within which folder."""
    folders = {}  # by indentation
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        first = line.split()[0]
        names = re.findall(r"(?<![\w/.*-])([\w*.-]+/|[\w*-]+\.(?:py|gin|sh|cc))(?![\w/])", line)
        if first.endswith("/") and depth <= 4:
            folders = {at: folder for at, folder in folders.items() if at < depth}
            parent = "".join(folders.values())
            folders[depth] = first
            yield parent + first
            names = names[1:]
        parent = "".join(folder for at, folder in folders.items() if at < depth or first == folder)
        yield from (parent + name for name in names)
