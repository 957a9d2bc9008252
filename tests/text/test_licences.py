"""What ships, and what the shipped model is trained on, is permissively licensed by its own statement."""

import importlib.metadata
import importlib.util
import pathlib

import pytest

from moe_jax.config import gin

ROOT = pathlib.Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("licences", ROOT / "assets" / "text" / "licences.py")
licences = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(licences)


def test_the_sources_of_the_demo_are_permissively_licensed():
    sources = set(gin.read_config(ROOT / "configs" / "train_demo.gin").text.sources) - {"stdlib"}
    assert len(sources) > 20
    for source in sources:
        licences.require_permissive(importlib.metadata.distribution(source))


def stating(tmp_path, *lines):
    """A distribution whose metadata has these lines."""
    folder = tmp_path / "madeup-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", "Name: madeup", "Version: 1.0", *lines]) + "\n"
    )
    return importlib.metadata.Distribution.at(folder)


@pytest.mark.parametrize(
    "lines",
    [
        ["License-Expression: MIT"],
        ["License-Expression: Apache-2.0 OR GPL-3.0-only"],
        ["License-Expression: (BSD-3-Clause AND Zlib)", "Classifier: License :: Other/Proprietary License"],
        ["License-Expression: Apache-2.0 WITH LLVM-exception"],
        ["Classifier: License :: OSI Approved :: BSD License"],
        ["Classifier: License :: OSI Approved", "License: BSD-3-Clause"],
        ["License: Apache License"],
    ],
)
def test_permissive_distributions_may_ship(lines, tmp_path):
    licences.require_permissive(stating(tmp_path, *lines))


@pytest.mark.parametrize(
    "lines",
    [
        ["License-Expression: MPL-2.0 AND MIT"],
        ["License-Expression: GPL-3.0-only"],
        ["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"],
        [
            "Classifier: License :: OSI Approved :: MIT License",
            "Classifier: License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
        ],
        ["License: MIT or GPL"],
        [],
    ],
)
def test_other_distributions_are_refused(lines, tmp_path):
    with pytest.raises(ValueError, match=r"the licence of 'madeup' is .*; expected a permissive one") as error:
        licences.require_permissive(stating(tmp_path, *lines))
    assert "\n" not in str(error.value)
