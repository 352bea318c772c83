"""What a person sees while a stage trains: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from diffdistill.training import processes


class Progress(Protocol):
    """Told by the loop how far it is. Called only with numbers already on the host."""

    def advance(self, update: int, metrics: Mapping[str, float]) -> None:
        """`update` updates are done; metrics: scalars of the latest call."""
        ...

    def close(self) -> None:
        """The loop ends, however it ends."""
        ...


def make_progress(
    stage: str, start: int, num_updates: int, stream: TextIO | None = None, unit: str = "update"
) -> Progress:
    """A tqdm bar where `stream` (default stderr) is a terminal, log lines elsewhere, nothing on other processes.

    `unit`: what is counted from `start` to `num_updates`, such as "update" or "image".
    """
    out = sys.stderr if stream is None else stream
    if not processes.is_main():
        return Silent()
    if out.isatty():
        return Bar(stage, start, num_updates, out, unit)
    return Lines(stage, start, num_updates, out, unit=unit)


class Silent:
    """Says nothing."""

    def advance(self, update: int, metrics: Mapping[str, float]) -> None:
        """Ignored."""

    def close(self) -> None:
        """Ignored."""


class Bar:
    """Progress bar with rate and remaining time."""

    def __init__(self, stage: str, start: int, num_updates: int, stream: TextIO, unit: str = "update") -> None:
        from tqdm import tqdm  # only a terminal needs it

        self._bar: Any = tqdm(
            total=num_updates, initial=start, desc=stage, unit=unit, file=stream, dynamic_ncols=True, smoothing=0.05
        )

    def advance(self, update: int, metrics: Mapping[str, float]) -> None:
        """Move the bar and show the loss."""
        if "loss" in metrics:
            self._bar.set_postfix_str(f"loss {metrics['loss']:.4g}", refresh=False)
        self._bar.update(update - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Lines:
    """One line every `interval` seconds, the first as soon as the first call is through, and one at the end."""

    def __init__(
        self,
        stage: str,
        start: int,
        num_updates: int,
        stream: TextIO,
        interval: float = 10.0,
        unit: str = "update",
    ) -> None:
        self._stage, self._start, self._total, self._unit = stage, start, num_updates, unit
        self._stream, self._interval = stream, interval
        self._mark: tuple[float, int] | None = None  # time and update when the first call was through
        self._last = 0.0
        self._written = start

    def advance(self, update: int, metrics: Mapping[str, float]) -> None:
        """Write a line where one is due."""
        now = time.monotonic()
        first = self._mark is None
        if self._mark is None:
            self._mark = (now, update)  # compilation is over: the rate counts from here
        if not first and update < self._total and now - self._last < self._interval:
            return
        self._last, self._written = now, update
        loss = f"  loss {metrics['loss']:.4g}" if "loss" in metrics else ""
        elapsed, done = now - self._mark[0], update - self._mark[1]
        rate = ""
        if done and elapsed > 0:
            rate = f"  {done / elapsed:.3g} {self._unit}s/s  {duration((self._total - update) * elapsed / done)} left"
        print(f"{self._stage}: {update}/{self._total}{loss}{rate}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
