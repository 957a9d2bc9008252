"""Chooses the held-out text, once: `python assets/text/choose.py` refuses where an archive already lies.

It draws files of 1 to 9 KB from every source, in a seeded order, and skips a file that shares more than a tenth of its
shingles with the rest of the corpus (licence headers aside): such a file would cost training text and measure copying.
The standard library gives `STDLIB_SHARE` of the bytes; the others share the rest by the square root of their size.
"""

import collections
import hashlib
import importlib.metadata
import json
import lzma
import math
import pathlib
import platform
import random
import sysconfig

import licences
import numpy as np

from moe_jax.text import corpus
from moe_jax.text.documents import Document
from moe_jax.text.held_out import ARCHIVE, MANIFEST
from moe_jax.text.near_duplicates import shingle

FOLDER = pathlib.Path(__file__).parent
SEED = 0
TOTAL_BYTES = 1_200_000
STDLIB_SHARE = 0.4
FILE_BYTES = (1_000, 9_000)
SHARED_FRACTION = 0.1
HEADER_FILES = 50  # a shingle in so many files of the corpus is a licence header
SOURCES = (
    *("stdlib", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "absl-py", "grain", "etils", "treescope"),
    *(
        "opt_einsum",
        "gin-config",
        "psutil",
        "packaging",
        "matplotlib",
        "huggingface_hub",
        "fsspec",
        "rich",
        "fonttools",
    ),
    *("pillow", "simplejson", "pyparsing", "prometheus_client", "protobuf"),
)


def candidates(documents) -> list[Document]:
    """Files of the wanted size that share little with the rest, in a seeded order."""
    shingles = [shingle(document.text) for document in documents]
    files_with, counts = np.unique(np.concatenate(shingles), return_counts=True)
    chosen = []
    for document, hashes in zip(documents, shingles):
        files = counts[np.searchsorted(files_with, hashes)]
        own, shared = np.sum(files == 1), np.sum((files > 1) & (files < HEADER_FILES))
        size = len(document.text.encode())
        if FILE_BYTES[0] <= size <= FILE_BYTES[1] and shared <= SHARED_FRACTION * (own + shared) and own > 50:
            chosen.append(document)
    random.Random(SEED).shuffle(chosen)
    return chosen


def choose(everything: corpus.Corpus) -> list[Document]:
    """Fills each source's quota of bytes."""
    roots = {source: math.sqrt(one.bytes) for source, one in everything.statistics.items() if source != corpus.STDLIB}
    rest = TOTAL_BYTES * (1 - STDLIB_SHARE) / sum(roots.values())
    quota = {source: root * rest for source, root in roots.items()} | {corpus.STDLIB: TOTAL_BYTES * STDLIB_SHARE}
    chosen, filled = [], collections.Counter()
    for document in candidates(everything.documents):
        if filled[document.source] < quota[document.source]:
            filled[document.source] += len(document.text.encode())
            chosen.append(document)
    return sorted(chosen, key=lambda document: (document.source, document.name))


def version_of(source: str) -> str:
    """Of the interpreter or the distribution."""
    return platform.python_version() if source == corpus.STDLIB else importlib.metadata.version(source)


def licence_of(source: str) -> str:
    """The licence text that the source itself ships."""
    if source == corpus.STDLIB:
        return (pathlib.Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(encoding="utf-8")
    texts = []
    for file in sorted(importlib.metadata.files(source) or [], key=str):
        in_metadata = any(part.endswith(".dist-info") for part in file.parts)
        if in_metadata and file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS")):
            texts.append(f"==== {file.name}\n\n{file.locate().read_text(encoding='utf-8')}")
    if not texts:
        raise ValueError(f"{source} ships no licence text: leave it out of SOURCES")
    return "\n\n".join(texts)


def main() -> None:
    """Writes the archive, its manifest and the licences."""
    if (FOLDER / ARCHIVE).exists():
        raise SystemExit(f"{FOLDER / ARCHIVE} exists: the held-out text is chosen once")
    for source in set(SOURCES) - {corpus.STDLIB}:
        licences.require_permissive(importlib.metadata.distribution(source))
    everything = corpus.collect(SOURCES, ())
    texts = {source: licence_of(source) for source in everything.statistics}
    documents = choose(everything)
    lines = [
        json.dumps({"source": one.source, "name": one.name, "text": one.text}, ensure_ascii=False) + "\n"
        for one in documents
    ]
    archive = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    files = []
    for document in documents:
        data = document.text.encode()
        files.append(
            {
                "source": document.source,
                "version": version_of(document.source),
                "name": document.name,
                "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data),
            }
        )
    (FOLDER / "LICENSES").mkdir(exist_ok=True)
    for source in sorted({document.source for document in documents}):
        (FOLDER / "LICENSES" / f"{source}.txt").write_text(texts[source], encoding="utf-8")
    manifest = {"bytes": sum(one["bytes"] for one in files), "files": files}
    (FOLDER / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (FOLDER / ARCHIVE).write_bytes(archive)
    print(f"{len(files)} files, {manifest['bytes']} bytes, {len(archive)} bytes compressed")


if __name__ == "__main__":
    main()
