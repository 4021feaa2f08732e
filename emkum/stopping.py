"""A signal to stop becomes Interrupted in the main thread, again if something swallows it."""

from __future__ import annotations

import signal
import sys
import types
import weakref
from typing import Any

from emkum.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # HUP: the terminal, or ssh, went away
INSIST_SECONDS = 0.1  # how often it is looked whether what was raised is still on its way

_received: list[str] = []  # the name of the signal that came
_raised: list[weakref.ref[Interrupted]] = []  # what was made of it; dead once something has swallowed it


def listen() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise Interrupted in this thread, the main one; a second ends at once.

    A library may catch Interrupted, and C code drops whatever a destructor or a comparison raises: then it is raised
    again. Not so where a library keeps it, as a future does: while it lives it counts as on its way. Never in the midst
    of an import: there libraries make errors of their own of it, and C++ aborts.
    """
    sys.unraisablehook = _unraisable
    for number in STOPPING:
        signal.signal(number, _on_signal)


def heard() -> Interrupted | None:
    """What came, if a signal came. It is not raised any more."""
    if not _received:
        return None
    signal.setitimer(signal.ITIMER_REAL, 0)
    return _interrupted()


def _on_signal(number: int, frame: types.FrameType | None) -> None:
    for either in STOPPING:  # nothing committed is at risk
        signal.signal(either, signal.SIG_DFL)
    _received.append(signal.Signals(number).name)
    signal.signal(signal.SIGALRM, _insist)
    signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS, INSIST_SECONDS)
    _insist(number, frame)


def _insist(number: int, frame: types.FrameType | None) -> None:
    if not any(stopped() for stopped in _raised) and not _is_importing(frame):
        raise _interrupted()  # without a name: its traceback would keep it alive


def _interrupted() -> Interrupted:
    stopped = Interrupted(f"stopped by {_received[0]}; what was committed is kept", "the same command continues")
    _raised.append(weakref.ref(stopped))
    return stopped


def _is_importing(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _unraisable(ignored: Any) -> None:
    """Of an Interrupted that cannot be raised where it is nothing is said: it will be raised again."""
    if not issubclass(ignored.exc_type, Interrupted):
        sys.__unraisablehook__(ignored)
