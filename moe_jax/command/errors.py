"""How a launcher fails: one line on standard error and an exit status."""

import contextlib
import os
import signal
import sys

from absl import logging

REFUSED = 2  # exit status for wrong flags, settings or files
READER_GONE = 128 + signal.SIGPIPE  # as the shell reports a process ended by SIGPIPE


def refuse(error: Exception) -> int:
    """Prints an error in one line, after its traceback if `--verbosity=1` is given; returns the exit status."""
    logging.debug("refused", exc_info=error)
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    one_line = " ".join(line.strip() for line in message.splitlines() if line.strip())
    print(f"error: {one_line or type(error).__name__}", file=sys.stderr, flush=True)
    return REFUSED


def discard_output() -> None:
    """Flushes standard output, or drops what cannot be written, so that the interpreter does not fail on it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
