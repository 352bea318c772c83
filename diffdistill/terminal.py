"""What the program says on the terminal, and the codes it ends with."""

from __future__ import annotations

import sys
import time
from typing import NoReturn

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FINITE, EXIT_SIGINT, EXIT_SIGTERM = 1, 2, 3, 130, 143
STARTED = time.monotonic()
"""When the program began, but for the start of the interpreter."""


def say(text: str) -> None:
    """Prints on the process that speaks for all."""
    from diffdistill.training.processes import is_main

    if is_main():
        print(text, flush=True)


def stopped(text: str) -> None:
    """Says why a run stopped before its end."""
    print(f"\n{text}", file=sys.stderr, flush=True)


def fail(text: str, code: int) -> NoReturn:
    """Ends the program with one message."""
    print(f"Error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
