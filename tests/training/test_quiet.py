"""What Orbax's helpers log of a write that failed is said by us; everything else stays."""

import logging

import pytest

from diffdistill.training import quiet


@pytest.mark.parametrize(
    ("message", "error", "kept"),
    [
        ("Future exception was never retrieved", OSError(28, "No space left on device"), False),
        ("Future exception was never retrieved", ValueError("a bug"), True),
        ("Task exception was never retrieved: /run/3.orbax-checkpoint-tmp/params", RuntimeError(), False),
        ("Executing <Task> took 2 seconds", None, True),
    ],
)
def test_what_asyncio_logs(message, error, kept):
    quiet.orbax()
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("asyncio", logging.ERROR, "base_events.py", 1, message, None, info)
    assert bool(logging.getLogger("asyncio").filter(record)) is kept
