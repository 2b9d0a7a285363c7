"""SIGINT (Ctrl-C) and SIGTERM end a run in order: after the step that must not be cut in two, or at once.

A handler must not raise. Python drops what it raises inside a finaliser, and the run goes on; raised at the end of a
``with lock``, it leaves the lock held, and the end in order waits for it for ever. So a handler takes note, for
``obey`` to raise between two steps, or ends the process on the spot.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"  # which progress bars hide


class Interruption:
    """The signal that came, if any, and what is done about it.

    Attributes:
        advice: a line for people, to be written to stderr when a signal ends the process.
    """

    def __init__(self) -> None:
        self.advice = ""
        self._number: int | None = None
        self._patient = False

    def obey(self) -> None:
        """End the process in order if a signal came.

        Raises:
            SystemExit: with the code of a process that the signal ended, 128 and its number.
        """
        if self._number is not None:
            raise SystemExit(128 + self._number)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Only take note of a first signal, for ``obey`` to be called between steps; a second one ends the process."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        self.obey()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._patient and self._number is None:
            self._number = number
            return
        # No finally of anybody runs: files are whole at any moment, and the system takes locks back.
        line = f"{self.advice}\n" if self.advice else ""
        os.write(2, (line + SHOW_CURSOR * sys.stderr.isatty()).encode())
        os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let SIGINT and SIGTERM end the process as ``Interruption`` says, and nothing else come of them.

    An error after a signal is a consequence of it, such as that of a data loader whose workers had the signal too.
    Outside the main thread, which alone may handle signals, they are left alone.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._handle) for number in SIGNALS}
    try:
        yield interruption
    except (Exception, SystemExit):
        if interruption._number is not None and interruption.advice:
            sys.stderr.write(f"{interruption.advice}\n")
        interruption.obey()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
