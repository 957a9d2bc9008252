import pathlib
import signal
import time

import pytest

from tests.command.ended import finished


@pytest.mark.parametrize(
    ("path", "number", "expected"),
    [("wait:raise", signal.SIGINT, 130), ("wait:raise", signal.SIGTERM, 143), ("wait:return", signal.SIGINT, 130)],
)
def test_interruption_lets_main_save_and_ends_at_once(start, path, number, expected):
    process = start(f"--set=model.path={path}", "--out=out")
    assert process.stdout.readline() == "waiting\n"
    began = time.monotonic()
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(number)  # an echo
    status, _, stderr = finished(process)
    assert time.monotonic() - began < 20, "main would sleep for 60 s"
    assert (status, stderr.splitlines()[-1], "Traceback" in stderr) == (expected, "interrupted", False)
    assert pathlib.Path("out/saved").read_text() == "what is done"
