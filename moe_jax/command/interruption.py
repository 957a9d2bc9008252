"""Turns SIGINT and SIGTERM into one KeyboardInterrupt that does not get lost."""

import signal
import sys
import time

_AGAIN_S = 0.05  # a KeyboardInterrupt that got lost is raised again after this
_ECHO_S = 1.0  # later signals within this are ignored: `timeout` sends two, and people press Ctrl-C twice
_HAS_TIMER = hasattr(signal, "setitimer")


def raise_on_signals() -> list[int]:
    """Makes the first signal raise KeyboardInterrupt; a signal more than a second later ends the process.

    Python drops an exception that is raised where nothing can catch it, such as in a callback of the garbage collector,
    and one raised during an import may leave a broken module. So a timer raises KeyboardInterrupt again until it is
    handled, and never during an import.

    Returns:
        A list that is empty until a signal arrives, and then holds its number.
    """
    received: list[int] = []
    first_s = 0.0

    def interrupt(number, frame):
        nonlocal first_s
        if not received:
            received.append(number)
            first_s = time.monotonic()
            if not _HAS_TIMER:
                raise KeyboardInterrupt
            signal.signal(signal.SIGALRM, insist)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
            insist(number, frame)
        elif time.monotonic() - first_s > _ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def insist(number, frame):
        if not _is_importing(frame) and not _is_handled():
            raise KeyboardInterrupt

    def say(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            say_others(unraisable)

    sys.unraisablehook, say_others = say, sys.unraisablehook
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return received


def ignore() -> None:
    """Ignores both signals from now on: at exit, Python removes its handlers, and a signal would kill the process."""
    if _HAS_TIMER:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _is_importing(frame) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _is_handled() -> bool:
    """Whether code is handling the KeyboardInterrupt, or an exception raised while handling it."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
