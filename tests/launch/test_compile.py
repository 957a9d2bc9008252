"""launch/compile.py on one virtual device: the verdict on a model that is too large, without compiling it."""

import json
import pathlib

from tests import launcher_module

ROOT = pathlib.Path(__file__).parents[2]


def test_a_model_that_is_too_large_says_where_it_would_fit(tmp_path):
    """671 B numbers of two bytes, of which 1.9 are embeddings and 17 are on every device: 128 of 20 GB hold them."""
    config = ROOT / "configs" / "models" / "deepseek_v3.gin"
    printed = launcher_module.run_main("compile", {}, tmp_path, config=config)
    result = json.loads((tmp_path / "result.json").read_text())
    figures = result["figures"]
    assert figures["fits"]["value"] == 0 and "needed_bytes" not in figures
    assert 1.342e12 < figures["held_bytes"]["value"] < 1.346e12
    assert "DOES NOT FIT: weights and cache take 1344" in printed
    assert "devices would hold them" in printed


def test_the_status_says_whether_it_fits(monkeypatch, tmp_path):
    launcher = launcher_module.import_launcher("compile")
    statuses = {}
    main = launcher.main
    monkeypatch.setattr(launcher, "main", lambda run: statuses.update({run.out: main(run)}))
    small = {"decoder.num_layers": 2, "compile.rows": 1, "compile.positions": 16}
    for name, settings in (("fits", small), ("large", small | {"decoder.vocab_size": 10**9})):
        (tmp_path / name).mkdir()
        launcher_module.run_main("compile", settings, tmp_path / name)
    assert statuses == {tmp_path / "fits": 0, tmp_path / "large": launcher.TOO_LARGE}
