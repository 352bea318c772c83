"""Orbax, made quiet: what it has to tell a user, `checkpoints` tells as a CheckpointError."""

import logging
import os
import sys
import warnings
from typing import Any


def orbax() -> None:
    """Install the filters below, once. Nothing but Orbax's own records is dropped."""
    for name, kind in (("absl", _NotOrbax), ("asyncio", _NotForgotten)):
        logger = logging.getLogger(name)
        if not any(isinstance(known, kind) for known in logger.filters):
            logger.addFilter(kind())
    if not isinstance(sys.unraisablehook, _NotClosedLoops):
        sys.unraisablehook = _NotClosedLoops(sys.unraisablehook)
    # The other writes of a checkpoint whose first write failed.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)


class _NotOrbax(logging.Filter):
    """Keeps Orbax's records out of the log: progress notes, and tracebacks of errors that we raise ourselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


class _NotForgotten(logging.Filter):
    """Keeps asyncio from listing the other writes that failed with the one we report."""

    def filter(self, record: logging.LogRecord) -> bool:
        message, error = record.getMessage(), record.exc_info[1] if record.exc_info else None
        forgotten = "was never retrieved" in message and isinstance(error, OSError)
        return "orbax-checkpoint-tmp" not in message and not forgotten


class _NotClosedLoops:
    """In place of `sys.unraisablehook`: after a failed write, the other writes report to an event loop that Orbax has
    closed, which is no news for a user. All else goes to the hook that was there before.
    """

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)
