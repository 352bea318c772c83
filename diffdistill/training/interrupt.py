"""SIGTERM and Ctrl-C: finish the call in flight, save, stop. A second signal stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

ACKNOWLEDGEMENT = "Stopping after this update and saving; the same signal again stops at once."


class Interrupt:
    """Remembers that somebody asked the run to stop. `reason` is the signal's name, or None."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """True once a signal has arrived (or `request` was called)."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask the run to stop at the next opportunity."""
        self.reason = reason


@contextlib.contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Within the context, SIGTERM and SIGINT set a flag instead of ending the process.

    A second signal has its default effect at once: KeyboardInterrupt for Ctrl-C, the end of the process for SIGTERM.
    Outside the main thread (where Python allows no handlers) the flag is merely never set.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    defaults: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if interrupt.requested:
            signal.signal(number, defaults[number])
            os.kill(os.getpid(), number)
            return
        interrupt.request(signal.Signals(number).name)
        # os.write: a handler may run in the middle of a print.
        os.write(2, b"\n" + ACKNOWLEDGEMENT.encode() + b"\n")

    previous = {number: signal.signal(number, handle) for number in defaults}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            # None: a handler that was not installed from Python and cannot be put back.
            signal.signal(number, defaults[number] if handler is None else handler)
