import pathlib

import pytest

from tests.command.ended import finished, refused_in_one_line


@pytest.mark.parametrize("platform", ["tpu", "a_typo"])
def test_a_missing_platform_is_refused(start, monkeypatch, platform):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    line = refused_in_one_line(start("--out=out", jax="real"))
    assert f"JAX_PLATFORMS = '{platform}'" in line and not pathlib.Path("out").exists()


def test_a_compilation_cache_that_cannot_be_written_gives_a_warning(start):
    pathlib.Path("cache").write_text("a file")
    status, _, stderr = finished(start("--set=model.path=status:0"))
    assert status == 0
    assert "compiled programs are not kept for the next run: " in stderr
