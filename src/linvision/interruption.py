"""SIGINT (Ctrl-C) and SIGTERM end a run in order: at once, or after the step that must not be cut in two.

A signal is remembered from its arrival to the exit. What a handler raises is not always heard: Python drops it inside a
finaliser, and an import that is tried may catch it. So whoever works on looks again, by ``obey``.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        """End the process if a signal came.

        Raises:
            SystemExit: with the code of a process that the signal ended, 128 and its number.
        """
        if self._number is not None:
            raise SystemExit(128 + self._number)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Only take note of a first signal, for ``obey`` to be called between steps; a second one is obeyed at once."""
        self.obey()
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        self.obey()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self._number is None
        self._number = number
        if not (self._patient and first):
            self.obey()


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let SIGINT and SIGTERM raise SystemExit in here, and nothing else come of them.

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
        interruption.obey()
    except (Exception, SystemExit):
        if interruption._number is not None and interruption.advice:
            sys.stderr.write(f"{interruption.advice}\n")
        interruption.obey()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
