import pathlib

import pytest

from tests.command.ended import finished, refused_in_one_line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cofig=a.gin"], ["cofig", "config"]),
        (["--config"], ["config"]),
        (["--json=perhaps"], ["json", "perhaps"]),
        (["a.gin"], ["'a.gin'", "expected a flag, as in --config a.gin"]),
        (["moe.k=3"], ["expected --set moe.k=3"]),
        (["--config=missing.gin"], ["missing.gin: no such config file"]),
        (["--set", "moe.kk=3"], ["--set moe.kk=3", "nearest: moe.k;"]),
        (["--set", "moe.k=a\nb"], ["moe.k=a b"]),
        (["--out=launch/probe.py"], ["--out = 'launch/probe.py': launch/probe.py is not a folder"]),
        (["--out=launch/probe.py/x"], ["launch/probe.py is not a folder"]),
        (["--out="], ["--out = ''"]),
        (["--out=new/" + "x" * 300], ["File name too long"]),
    ],
)
def test_a_wrong_command_line_is_refused_before_jax_is_imported(start, arguments, expected):
    line = refused_in_one_line(start(*arguments, jax="forbidden"))
    assert [part for part in expected if part not in line] == [], line
    assert not pathlib.Path("new").exists()


def test_help_lists_the_flags_and_succeeds(start):
    status, stdout, stderr = finished(start("--help", jax="forbidden"))
    assert (status, stderr) == (0, "")
    for part in ("Probes: what one launcher does.", "--config", "--set", "--out", "--[no]json"):
        assert part in stdout
