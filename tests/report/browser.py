"""A headless Chromium without a network, driven through the pipe of its DevTools protocol."""

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import signal
import time

import PIL.Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PATIENCE_S = 120  # for one answer, on a busy machine
HEIGHT = 800


def find() -> str:
    """The path of a Chromium."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, f"no Chromium on PATH: expected one of {', '.join(NAMES)}; on Debian, apt-get install chromium"
    return found


class Browser:
    """One window. `say` sends a command of the protocol and waits for its result."""

    def __init__(self, write_fd, read_fd):
        self._write_fd, self._read_fd = write_fd, read_fd
        self._received, self._sent, self._session = b"", 0, {}
        target = self.say("Target.createTarget", url="about:blank")["targetId"]
        attached = self.say("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def say(self, method, **params):
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._sent:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self):
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read_fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"Chromium said nothing for {PATIENCE_S} s"
            part = os.read(self._read_fd, 1 << 20)
            assert part, "Chromium ended"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def show(self, path, width, *, dark=False):
        """Loads a file on a screen of that width; below 640 pixels it is a phone."""
        self.say(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=width < 640,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.say("Emulation.setEmulatedMedia", features=[scheme])
        for url in ("about:blank", path.as_uri()):
            failed = self.say("Page.navigate", url=url).get("errorText")
            assert not failed, failed
            deadline = time.monotonic() + PATIENCE_S
            while self.ask("location.href + document.readyState") != f"{url}complete":
                assert time.monotonic() < deadline, f"{url} did not load"
                time.sleep(0.05)

    def ask(self, expression):
        """The value of an expression on the page."""
        answer = self.say("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self):
        """A picture of the screen."""
        image = self.say("Page.captureScreenshot", format="png")["data"]
        return PIL.Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")


@contextlib.contextmanager
def started(profile):
    """Starts a Chromium with an empty profile in that folder, and ends it with the block."""
    command = [find(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]
    os.close(theirs_in)
    os.close(theirs_out)
    with open(profile.with_suffix(".log"), "wb") as log:
        redirected = [
            (os.POSIX_SPAWN_DUP2, *pair) for pair in ((log.fileno(), 1), (log.fileno(), 2), (high[0], 3), (high[1], 4))
        ]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=redirected, setpgroup=0)
    for fd in high:
        os.close(fd)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours_out)
        os.close(ours_in)
