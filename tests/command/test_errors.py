import os
import pathlib

import pytest

from tests.command.ended import finished, refused_in_one_line


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("value:", "error: two lines"),
        ("os:gone", "error: gone: No such file or directory"),
        ("full:", "error: No space"),
    ],
)
def test_an_error_of_main_is_one_line_and_leaves_no_folder(start, path, expected):
    line = refused_in_one_line(start(f"--set=model.path={path}", "--out=a/b"))
    assert line.startswith(expected)
    assert not pathlib.Path("a").exists()


def test_a_bug_keeps_its_traceback(start):
    status, _, stderr = finished(start("--set=model.path=bug"))
    assert status == 1
    assert "Traceback" in stderr and "RuntimeError: a bug" in stderr and "error: " not in stderr


def test_the_status_of_main_is_the_exit_status(start):
    assert finished(start("--set=model.path=status:3"))[0] == 3


def test_a_closed_pipe_ends_the_run_quietly(start):
    reading, writing = os.pipe()
    os.close(reading)
    status, _, stderr = finished(start("--set=model.path=print", stdout=writing))
    os.close(writing)
    assert (status, stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_standard_output_on_a_full_disk_is_refused(start):
    with open("/dev/full", "w") as full:
        status, _, stderr = finished(start("--set=model.path=print", stdout=full))
    assert (status, stderr) == (2, "error: No space left on device\n")
